"""The runs of a few-shot curve: one for each number of training rows and each draw of them; finished ones are found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.config import Resolved
from peftkit.config.hints import find_slots
from peftkit.errors import ConfigError, PeftkitError, RunError
from peftkit.events import Note, Report, Warned, silent
from peftkit.extras import extra
from peftkit.recipe.few_shot.curve import Curve, Draw, keep
from peftkit.recipe.fields import with_whole_paths
from peftkit.recipe.files import Recipe, configure, default_name, find, load
from peftkit.recipe.run import Interrupted
from peftkit.recipe.sweeping.plan import whole_path
from peftkit.recipe.sweeping.space import find_key, read_space
from peftkit.recipe.sweeping.trial import objective_of, run_trial, split_metric
from peftkit.runs import RunStatus, list_runs
from peftkit.runs.contents import read_json
from peftkit.runs.lock import hold

_HELD_OUT = "SHA-256 of held-out rows"


@dataclass(frozen=True)
class FewShot:
    """What was asked for: the recipe, the numbers of rows, how many draws of each, and what is the same in all."""

    recipe: Recipe
    preset: str | None
    sizes: tuple[int, ...]
    draws: int
    fixed: tuple[str, ...]
    rows_key: str
    draw_key: str
    metric: str | None

    def configured(self, rows: int, draw: int) -> Resolved[Any]:
        """The settings of one run."""
        overrides = [*self.fixed, f"{self.rows_key}={rows}", f"{self.draw_key}={draw}"]
        return configure(self.recipe, preset=self.preset, overrides=overrides)

    @property
    def name(self) -> str:
        """A name for all runs that differ in their rows alone: the same command finds what it did before."""
        settings = self.configured(1, 0).as_dict()
        digest = hashlib.sha256(f"{self.recipe.sha256}{json.dumps(settings, sort_keys=True)}".encode()).hexdigest()
        return f"{default_name(self.recipe)}-{digest[:8]}"


def read_few_shot(
    recipe: str,
    arguments: Sequence[str],
    *,
    draws: int = 5,
    preset: str | None = None,
    metric: str | None = None,
) -> FewShot:
    """What the command line asks for, checked: `n=8,16,32` and fixed settings. Raises ConfigError with all problems."""
    loaded = load(find(recipe))
    slots = find_slots(loaded.config)
    given = {argument: argument.partition("=") for argument in arguments}
    sizes = [text for name, _, text in given.values() if name == "n"]
    space, problems = read_space(loaded.config, [argument for argument, part in given.items() if part[0] != "n"])
    problems += [f"{d.key}: {d}: only n takes several values here; peftkit sweep searches" for d in space.dimensions]
    keys: dict[str, str] = {}
    for name in ("max_train_rows", "draw"):
        try:
            keys[name] = find_key(name, slots)
        except ValueError:
            problems.append(f"the recipe has no setting {name!r} of its data, so its training rows cannot be drawn")
    taken = {text.partition("=")[0] for text in space.fixed}
    problems += [f"{key}: few-shot runs set it themselves" for key in keys.values() if key in taken]
    numbers = _numbers(sizes, problems)
    if metric is not None:
        try:
            split_metric(metric)
        except ConfigError as error:
            problems += error.problems
    fixed = tuple(f"{key}={whole_path(key, text)}" for key, _, text in (each.partition("=") for each in space.fixed))
    if not problems:
        asked = FewShot(loaded, preset, numbers, draws, fixed, keys["max_train_rows"], keys["draw"], metric)
        try:
            asked.configured(numbers[0], 0)
            return asked
        except ConfigError as error:
            problems += error.problems
    raise ConfigError(problems, where="the few-shot runs")


def few_shot_folder(runs: Path, asked: FewShot) -> Path:
    """Where these runs are: hidden in the folder of runs, so that they are not listed among the others."""
    return runs / ".few-shot" / asked.name


def few_shot(folder: Path, asked: FewShot, *, registry: Path | None = None, report: Report = silent) -> Curve:
    """Run what is not in `folder` yet, the largest first, and sum it up; nothing goes to the registry.

    A draw whose run fails is counted and left out. Raises RunError when two runs have other held-out rows, too few
    training rows, or nothing but failures; Interrupted after Ctrl-C, ConfigError without scipy.
    """
    with extra("tasks", "the interval over draws"):
        import scipy.stats  # noqa: F401  before hours of training, not after
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder)
    try:
        report(Note(f"few-shot runs in {folder}"))
        found: list[Draw] = []
        before = _finished(folder, asked.recipe)
        for rows in reversed(asked.sizes):  # what has too few rows, or no memory, shows at once
            for draw in range(asked.draws):
                found.append(_one(folder, asked, rows, draw, before, registry, report))
                _check_held_out(folder, found)
                curve = keep(folder, asked.recipe.name, asked.fixed, found)
    finally:
        lock.release()
    if not any(draw.objective for draw in found):
        raise RunError(f"none of {len(found)} few-shot runs gave a figure; the first: {found[0].reason}")
    return curve


def _numbers(sizes: Sequence[str], problems: list[str]) -> tuple[int, ...]:
    """The values of n, smallest first."""
    if len(sizes) != 1:
        problems.append("n: give the numbers of training rows once, such as n=8,16,32,64,128")
        return ()
    parts = sizes[0].split(",")
    wrong = [part for part in parts if not re.fullmatch(r"[1-9]\d*", part.strip())]
    problems += [f"n: {part!r} is no number of rows" for part in wrong]
    numbers = [int(part) for part in parts if part not in wrong]
    problems += [f"n: {number} stands twice" for number in dict.fromkeys(numbers) if numbers.count(number) > 1]
    return tuple(sorted(set(numbers)))


def _one(
    folder: Path,
    asked: FewShot,
    rows: int,
    draw: int,
    before: Mapping[str, RunStatus],
    registry: Path | None,
    report: Report,
) -> Draw:
    """The figures of one draw: of the run that was finished before, or of a new one."""
    resolved, name = asked.configured(rows, draw), f"few-shot-{rows}-{draw}"
    if (done := before.get(_key(with_whole_paths(resolved.as_dict())))) is not None:
        report(Note(f"n = {rows}, draw {draw}: done before, in {done.id}"))
        return _summed_up(rows, draw, done.path, done.figures, asked)
    report(Note(f"n = {rows}, draw {draw}"))
    try:
        result = run_trial(
            asked.recipe, resolved, folder, name, registry=registry, stop=lambda *seen: False, report=report
        )
        path = folder / "runs" / str(result.run_id)
        found = _summed_up(rows, draw, path, result.figures, asked)
    except Interrupted:
        hint = "give the same command again: finished runs are found"
        raise Interrupted(f"interrupted at n = {rows}, draw {draw}", hint=hint) from None
    except RunError:
        raise
    except (PeftkitError, MemoryError, RuntimeError, ValueError, ArithmeticError) as error:
        reason = str(getattr(error, "fact", None) or f"{type(error).__name__}: {error}")
        report(Warned(f"n = {rows}, draw {draw} failed: {reason}"))
        return Draw(rows, draw, reason=reason)
    finally:
        shutil.rmtree(folder / "registry" / name, ignore_errors=True)
    if found.objective:
        report(Note(f"n = {rows}, draw {draw}: {found.objective.name} {found.objective.value:.4g}"))
    return found


def _summed_up(rows: int, draw: int, path: Path, figures: Mapping[str, Any], asked: FewShot) -> Draw:
    """A finished run's figures. Raises RunError when it had fewer training rows than were asked for."""
    audit, _ = read_json(path, "audit.json")
    held = next((part["rows"] for part in (audit or {}).get("parts", []) if part["role"] == "train"), rows)
    if held < rows:
        raise RunError(
            f"n = {rows}: there are only {held} training rows",
            expected=f"at least {rows} rows beside the held-out ones",
            hint="leave the larger values of n out, or give more rows",
        )
    bound, _ = read_json(path, "binding.json")
    digest = (bound or {}).get("data", {}).get(_HELD_OUT)
    return Draw.of(rows, draw, path.name, digest, objective_of(figures, asked.metric), figures)


def _check_held_out(folder: Path, found: Sequence[Draw]) -> None:
    """Raise RunError unless all runs were measured on the same rows."""
    digests = {draw.held_out for draw in found if draw.held_out is not None}
    if len(digests) > 1:
        raise RunError(
            f"the runs in {folder} were measured on {len(digests)} different sets of held-out rows",
            expected="the same rows for every n and draw",
            hint="was the file of rows changed? remove that folder and begin again",
        )


def _finished(folder: Path, recipe: Recipe) -> dict[str, RunStatus]:
    """Runs that are done, by their settings."""
    found = {}
    for run in list_runs(folder / "runs"):
        if run.state == "done":
            with contextlib.suppress(ConfigError):  # of a version with other settings
                found[_key(configure(recipe, files=[run.path / "config.yaml"]).as_dict())] = run
    return found


def _key(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True)
