"""What a run will take, from its settings, its base's config and its rows' lengths: memory, time, disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import OutOfMemory, RunError
from peftkit.events import Note, Report, Table, Warned
from peftkit.planning.architecture import Architecture
from peftkit.planning.disk import Disk, DiskPart, Place, check_free, disk_plan
from peftkit.planning.memory import MemoryPlan, plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.time import TimePlan, Workload, plan_time
from peftkit.planning.tokens import micro_batch_tokens
from peftkit.recipe.groups import Groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.measuring import measuring
from peftkit.recipe.setting import setting_of
from peftkit.recipe.target import Target
from peftkit.render import duration, number, size
from peftkit.training.preference.spec import PreferenceTrainSpec


@dataclass(frozen=True)
class Forecast:
    """The plan of one run on one target."""

    setting: Setting
    lengths: Lengths
    target: Target
    memory: MemoryPlan
    time: TimePlan | None
    steps: int | None
    disk: tuple[DiskPart, ...]
    assumed: tuple[str, ...] = ()
    """What is planned for without being known yet, a sentence each."""

    def as_record(self) -> dict[str, Any]:
        """As plain JSON values: what plan.json of a run holds."""
        return {
            "setting": asdict(self.setting),
            "lengths": asdict(self.lengths),
            "parts": [{"name": p.name, **asdict(p.bytes), "formula": p.formula} for p in self.memory.parts],
            "stages": [{"name": stage.name, **asdict(stage.bytes)} for stage in self.memory.stages],
            "limit": self.memory.limit.name,
            "peak": asdict(self.memory.peak),
            "target": self.target.name,
            "budget": self.target.bytes,
            "steps": self.steps,
            "time": asdict(self.time) if self.time else None,
            "disk": [{"name": part.name, "bytes": part.bytes, "where": part.place} for part in self.disk],
            "assumed": list(self.assumed),
        }

    def tell(self, report: Report) -> None:
        """Report the plan as tables and notes."""
        parts = [part for part in self.memory.parts if part.bytes.high]
        rows = [(part.name, size(part.bytes.expected), _between(part.bytes), part.formula) for part in parts]
        for stage in self.memory.stages:
            most = "the most" if stage is self.memory.limit else ""
            rows.append((f"peak: {stage.name}", size(stage.bytes.expected), _between(stage.bytes), most))
        report(Table(f"memory on {self.target.name}", ("part", "expected", "low to high", "how"), tuple(rows)))
        kept = [(part.name, size(part.bytes), f"{part.place}: {part.formula}") for part in self.disk]
        report(Table("disk", ("files", "bytes", "where and how"), tuple(kept)))
        for text in self.assumed:
            report(Note(text))
        setting = self.setting
        most = number(micro_batch_tokens(setting))
        at_once = f"at most {most} tokens at once, the longest row of {number(setting.longest)}"
        steps = f"{number(self.steps)} steps" if self.steps else "steps"
        report(Note(f"{steps} of {setting.rows_per_step} rows, {at_once}"))
        if self.time is not None and self.steps:
            report(Note(f"time, from the device's figures: {_span(self.time)}; the probe measures it"))

    def check_memory(self, report: Report) -> None:
        """Say how the plan stands to the memory there is; raises OutOfMemory when it cannot fit."""
        limit, room = self.memory.limit, self.target.bytes
        if room is None:
            return
        peak = limit.bytes
        need = f"{size(peak.expected)} ({_between(peak)}) to {limit.name}"
        fact = f"the plan needs {need}, and {self.target.name} has {size(room)}"
        hint = f"let peftkit find settings that fit: --budget {_as_flag(room)}; if you know better, give a larger one"
        if peak.low > room:
            raise OutOfMemory(fact, expected="a plan that fits", hint=hint)
        if peak.high > room:
            report(Warned(f"{fact}: it may run out of memory", hint))
        else:
            report(Note(f"{fact}: it fits"))

    def check_disk(self, places: Mapping[Place, Path]) -> None:
        """Raise RunError when a disk has no room for what the run will write."""
        problems = check_free(self.disk, {place: _disk(path) for place, path in places.items()})
        if problems:
            raise RunError(
                "; ".join(problems),
                expected="room for all of it before the first step",
                hint="free some space (peftkit runs gc, peftkit gc), lower train.save_total_limit, or set --runs and "
                "--registry to another disk",
            )


def forecast(
    architecture: Architecture, given: Groups, lengths: Lengths, target: Target, *, base_present: bool = True
) -> Forecast:
    """Plan memory, time and disk of a run. Raises BaseError when target_modules fit no layer."""
    architecture = lengths.headed(architecture)
    setting = setting_of(architecture, given, lengths, target)
    steps = _steps(given, lengths)
    return Forecast(
        setting,
        lengths,
        target,
        plan_memory(architecture, setting),
        plan_time(architecture, setting, target.machine, workload(given, lengths, steps)) if target.machine else None,
        steps,
        disk_plan(
            architecture,
            setting,
            base_present=base_present,
            save_total_limit=given.train.save_total_limit,
            keeps_best=given.train.eval_steps is not None,
            cached_tokens=_cached_tokens(given, lengths),
            merged=True,  # what `peftkit merge` would write later; a run does not, so its disk is not checked
        ),
        _assumed(given, setting),
    )


def _assumed(given: Groups, setting: Setting) -> tuple[str, ...]:
    said = []
    if given.quant.compute_dtype == "measured" and given.quant.bits != 32 and setting.device == "cpu":
        measured = "quant.compute_dtype=measured is decided when the base is loaded"
        said.append(f"planned in float32, which takes more: {measured}")
    if setting.asked_rows:
        said.append("evaluate.shots loads the base once more to ask it in words; the time of that is not planned")
    return tuple(said)


def _steps(given: Groups, lengths: Lengths) -> int | None:
    train = given.train
    if lengths.rows is None:
        return train.max_steps
    rows = max(1, round(lengths.rows * train.num_train_epochs))
    steps = train.max_steps or -(-rows // train.rows_per_step)
    if train.max_tokens:
        steps = min(steps, max(1, int(train.max_tokens / (lengths.mean * train.rows_per_step))))
    return steps


def workload(given: Groups, lengths: Lengths, steps: int | None) -> Workload:
    """How much a run reads and answers."""
    train, rows = given.train, lengths.rows or 0
    between = (steps or 0) // train.eval_steps if train.eval_steps else 0
    measured = measuring(given.evaluate, lengths.held_out_rows, has_head=lengths.task is not None)
    before = besides = 0.0
    if train.trunk_cache:
        before = _cached_tokens(given, lengths)
    elif isinstance(train, PreferenceTrainSpec) and train.compares_with_base:
        besides = lengths.mean if train.loss == "kto" else 0.0
        sequences = 2 if train.loss == "kto" else 1  # an answer and a mismatched one, or both of a pair as a row
        before = sequences * (rows * lengths.mean + lengths.held_out_rows * lengths.held_out_mean)
    return Workload(
        steps or 0,
        lengths.mean,
        measured.passes + between,
        lengths.held_out_rows,
        lengths.held_out_mean,
        answers=measured.answers,
        tokens_before=before,
        read_besides=besides,
    )


def _cached_tokens(given: Groups, lengths: Lengths) -> int:
    """Tokens of the rows that a trunk's cache holds: those that are trained on, and those that mid-run measures."""
    held_out = lengths.held_out_rows * lengths.held_out_mean if given.train.eval_steps else 0
    return int((lengths.rows or 0) * lengths.mean + held_out)


def _between(range_: Any) -> str:
    return f"{size(range_.low)} to {size(range_.high)}"


def _span(time: TimePlan) -> str:
    total = time.total
    return f"about {duration(total.expected)} ({duration(total.low)} to {duration(total.high)})"


def _as_flag(count: int) -> str:
    return f"{count / 1e9:.1f}GB"


def _disk(path: Path) -> Disk:
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return Disk(there.stat().st_dev, shutil.disk_usage(there).free)
