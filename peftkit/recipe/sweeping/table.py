"""What a sweep found: trials best first, the command of the best, which settings mattered; as table, JSON and page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.atomic import replace_file
from peftkit.events import Note, Report, Table, Warned
from peftkit.plain import as_json_text
from peftkit.recipe.sweeping.plan import Plan
from peftkit.recipe.sweeping.suggest import importance
from peftkit.recipe.sweeping.trial import Trial
from peftkit.render import duration, interval, number

RESULT, PAGE = "sweep.json", "sweep.html"
_ORDER = {"done": 0, "pruned": 1, "failed": 2, "running": 3}


@dataclass(frozen=True)
class Sweep:
    """A sweep and its trials, best first; those without a figure come last."""

    name: str
    folder: Path
    plan: Plan
    trials: tuple[Trial, ...]
    importance: dict[str, float]

    @property
    def best(self) -> Trial | None:
        """The trial with the best objective, the earliest of equals; None when none has one."""
        return self.trials[0] if self.trials and self.trials[0].objective else None

    @property
    def command(self) -> str | None:
        """What trains the best trial's adapter again and keeps it."""
        return self.plan.command(self.best.settings, self.name) if self.best else None

    @property
    def warnings(self) -> list[str]:
        """What a reader must know of the best figure."""
        done = [trial for trial in self.trials if trial.objective]
        found = []
        if len(done) > 1:
            found.append(
                f"the best of {len(done)} figures was chosen on the held-out rows that gave it, so it is better than "
                "rows that nobody has chosen by would show: measure the adapter on other rows (peftkit eval)"
            )
        sources = [key for key in self.plan.space.keys if key.endswith(".source")]
        if sources and done and done[0].objective and done[0].objective.name.endswith("nll"):
            found.append(
                "bases with different tokenizers cut the same answers into other tokens, and nats per token do not "
                "compare them: choose between bases by a score (--metric)"
            )
        return found

    def record(self) -> dict[str, Any]:
        """What sweep.json holds."""
        return {
            "name": self.name,
            "plan": self.plan.record(),
            "best": self.best.index if self.best else None,
            "command": self.command,
            "warnings": self.warnings,
            "importance": self.importance,
            "trials": [trial.record() for trial in self.trials],
        }

    def tell(self, report: Report) -> None:
        """Report the table, what mattered, the warnings and the command."""
        report(Table(f"sweep {self.name}, best first", *rows(self)))
        if self.importance:
            said = ", ".join(f"{key} {share:.0%}" for key, share in self.importance.items())
            report(
                Note(f"what mattered for being among the best tenth (a hint, from {len(self.trials)} trials): {said}")
            )
        for warning in self.warnings:
            report(Warned(warning))
        report(Note(f"page: {self.folder / PAGE}"))
        if self.command:
            report(Note(f"the best again, and kept: {self.command}"))


def keep(folder: Path, plan: Plan, trials: Sequence[Trial]) -> Sweep:
    """Write sweep.json and sweep.html as one step each, and let go of the adapters of all trials but the best."""
    from peftkit.recipe.sweeping.page import sweep_page

    ordered = sorted(trials, key=_rank)
    result = Sweep(folder.name, folder, plan, tuple(ordered), importance(plan.space, trials))
    replace_file(folder / RESULT, as_json_text(result.record()))
    replace_file(folder / PAGE, sweep_page(result))
    kept = {_scratch(folder, trial) for trial in ordered if trial is result.best or trial.state == "running"}
    with contextlib.suppress(FileNotFoundError):
        for path in (folder / "registry").iterdir():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
    return result


def rows(sweep: Sweep) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """Columns and lines of the table, also for the page."""
    name = sweep.best.objective.name if sweep.best and sweep.best.objective else "objective"
    columns = ("trial", *(key.rpartition(".")[2] for key in sweep.plan.space.keys), name, "time", "")
    return columns, tuple(_line(sweep, trial) for trial in sweep.trials)


def _line(sweep: Sweep, trial: Trial) -> tuple[Any, ...]:
    settings = (trial.settings.get(key, "recipe's own") for key in sweep.plan.space.keys)
    how = {"done": "best" if trial is sweep.best else "", "running": "running"}.get(trial.state, trial.state)
    remark = ", ".join(text for text in (how, trial.why) if text)
    if trial.state == "failed":
        remark += f": {trial.reason}"
    return str(trial.index), *settings, _figure(trial), duration(trial.seconds), remark


def _figure(trial: Trial) -> str:
    found = trial.objective
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return number(found.value)
    return interval(found.value, found.low, found.high)


def _rank(trial: Trial) -> tuple[float, ...]:
    return _ORDER[trial.state], trial.objective.cost if trial.objective else 0.0, trial.index


def _scratch(folder: Path, trial: Trial) -> Path:
    return folder / "registry" / f"sweep-{folder.name}-{trial.index:03d}"
