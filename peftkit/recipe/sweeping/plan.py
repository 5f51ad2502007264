"""What a sweep was asked for: the recipe, the space, the figure and the seed, kept in its folder for `--resume`."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.atomic import replace_file
from peftkit.config import Resolved
from peftkit.config.spec import leaves
from peftkit.errors import ConfigError, RunError
from peftkit.plain import as_json_text
from peftkit.recipe.fields import with_whole_paths
from peftkit.recipe.files import Recipe, configure, default_name, find, load
from peftkit.recipe.sweeping.space import Choices, Dimension, Space, read_space, space_of
from peftkit.recipe.sweeping.trial import split_metric
from peftkit.registry.layout import check_name

PLAN = "plan.json"
_RECIPE = "recipe"
_COMBINATIONS = 128
"""Combinations that are all checked; of more, each value beside the first ones of the other settings."""
_SHOWN = 20


@dataclass(frozen=True)
class Plan:
    """What is the same in every trial of a sweep, and in every process that works on it."""

    recipe: Recipe
    asked_as: str
    """The recipe as the user named it: a shipped one, or a whole path."""
    preset: str | None
    space: Space
    metric: str | None
    seed: int
    prune: bool

    def configured(self, settings: dict[str, str]) -> Resolved[Any]:
        """The settings of a trial. Raises ConfigError where they contradict each other."""
        overrides = [*self.space.fixed, *(f"{key}={text}" for key, text in settings.items())]
        return configure(self.recipe, preset=self.preset, overrides=overrides)

    @property
    def own(self) -> dict[str, str] | None:
        """What the recipe sets of what is searched, without what it leaves open; None where that is no valid trial."""
        try:
            values = dict(leaves(self.configured({}).config))
        except ConfigError:
            return None
        return {d.key: _written(d, values[d.key]) for d in self.space.dimensions if values.get(d.key) is not None}

    def command(self, settings: dict[str, str], save_as: str) -> str:
        """The command that trains a trial's adapter again and keeps it."""
        words = ["peftkit", "train", self.asked_as, *(["--preset", self.preset] if self.preset else [])]
        words += [*self.space.fixed, *(f"{key}={text}" for key, text in settings.items())]
        return shlex.join([*words, f"save_as={save_as}"])

    def record(self) -> dict[str, Any]:
        """As plan.json keeps it."""
        return {
            "format": 1,
            "recipe": {"name": self.asked_as, "file": self.recipe.path.name, "sha256": self.recipe.sha256},
            "preset": self.preset,
            **self.space.record(),
            "metric": self.metric,
            "seed": self.seed,
            "prune": self.prune,
        }


def read_plan(
    recipe: str,
    arguments: Sequence[str],
    *,
    preset: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    prune: bool = True,
) -> Plan:
    """What the command line asks for, checked: every problem of every value at once. Raises ConfigError, RunError."""
    path = find(recipe)
    loaded = load(path)
    space, problems = read_space(loaded.config, arguments)
    if metric is not None:
        try:
            split_metric(metric)
        except ConfigError as error:
            problems += error.problems
    if any(key == "save_as" for key in (*space.keys, *(text.partition("=")[0] for text in space.fixed))):
        problems.append("save_as: a sweep keeps no adapter; train the best trial again with the command that it prints")
    if not space.dimensions and not problems:
        problems.append("nothing is searched: give a setting choices or a range, such as learning_rate=1e-5..1e-3")
    asked = recipe if path.stem == recipe else str(path.absolute())
    plan = Plan(loaded, asked, preset, _with_whole_paths(space), metric, seed, prune)
    problems += _wrong_combinations(plan)
    if problems:
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ConfigError([*problems[:_SHOWN], *more], where="the sweep")
    return plan


def sweeps_folder(runs: Path) -> Path:
    """Where the sweeps of a folder of runs are: hidden in it, so that their runs are not listed among the others."""
    return runs / ".sweeps"


def started(sweeps: Path, name: str | None, recipe: str, arguments: Sequence[str], **asked: Any) -> Path:
    """The folder of a new sweep, with its plan and a copy of its recipe; `asked` goes to `read_plan`, which checks it.

    Raises what `read_plan` raises, and RunError for a name that another sweep has.
    """
    plan = read_plan(recipe, arguments, **asked)
    folder = sweeps / check_name(name or _free_name(plan.recipe, sweeps))
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise RunError(
            f"there is a sweep {folder.name} already, in {folder}",
            expected="a new name",
            hint=f"go on with it: peftkit sweep --resume {folder.name}",
        ) from None
    (folder / _RECIPE).mkdir()
    shutil.copyfile(plan.recipe.path, folder / _RECIPE / plan.recipe.path.name)
    replace_file(folder / PLAN, as_json_text(plan.record()))  # last: without it the folder is no sweep
    return folder


def continued(sweeps: Path, name: str, recipe: str | None, arguments: Sequence[str], **asked: Any) -> Path:
    """The folder of a sweep to go on with; a recipe and settings, where given, must be those that it began with.

    Raises RunError when there is no such sweep, ConfigError naming each difference.
    """
    folder = sweeps / name
    plan = load_plan(folder)
    if recipe is not None:
        _refuse_other(plan, read_plan(recipe, arguments, **asked), name)
    return folder


def load_plan(folder: Path) -> Plan:
    """The plan of a sweep's folder. Raises RunError where there is none, naming those that there are."""
    try:
        kept = json.loads((folder / PLAN).read_bytes())
    except FileNotFoundError:
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{PLAN}"))
        raise RunError(
            f"there is no sweep {folder.name} in {folder.parent}",
            expected=f"one of: {', '.join(there)}" if there else "a sweep; there is none yet",
        ) from None
    except ValueError as error:
        raise RunError(f"{folder / PLAN} cannot be read: {error}", hint="start the sweep again") from error
    recipe = load(folder / _RECIPE / kept["recipe"]["file"])
    return Plan(
        recipe, kept["recipe"]["name"], kept["preset"], space_of(kept), kept["metric"], kept["seed"], kept["prune"]
    )


def _refuse_other(plan: Plan, asked: Plan, name: str) -> None:
    """Raise ConfigError naming each difference between a sweep's plan and what is asked of it now."""
    before, now = ({**_flat(each)} for each in (plan, asked))
    different = [
        f"{key}: {before.get(key, 'not there')} then, {now.get(key, 'not there')} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            different,
            where=f"what is asked of the sweep {name}, which began with other settings",
            hint=f"peftkit sweep --resume {name} takes its settings from its folder; for others begin another sweep",
        )


def _free_name(recipe: Recipe, sweeps: Path) -> str:
    """A name that no sweep has yet: the recipe's own and a number."""
    return next(name for n in itertools.count(1) if not (sweeps / (name := f"{default_name(recipe)}-{n}")).exists())


def _flat(plan: Plan) -> dict[str, str]:
    facts = {
        "recipe": f"{plan.asked_as} ({plan.recipe.sha256[:8]})", "preset": str(plan.preset),
        "metric": str(plan.metric), "seed": str(plan.seed), "prune": str(plan.prune).lower(),
    }  # fmt: skip
    fixed = dict(text.split("=", 1) for text in plan.space.fixed)
    return facts | {d.key: str(d) for d in plan.space.dimensions} | fixed


def _with_whole_paths(space: Space) -> Space:
    """The space with files and bases named from the root: a sweep may be gone on with from any folder."""
    dimensions = [
        replace(d, texts=tuple(whole_path(d.key, text) for text in d.texts)) if isinstance(d, Choices) else d
        for d in space.dimensions
    ]
    fixed = [text.partition("=") for text in space.fixed]
    return Space(tuple(dimensions), tuple(f"{key}={whole_path(key, value)}" for key, _, value in fixed))


def whole_path(key: str, text: str) -> str:
    """A value of the command line; one that names a file here, or the folder of a base, named from the root."""
    if key.endswith(".source") and Path(text).is_dir():
        return str(Path(text).absolute())
    return str(with_whole_paths(text))


def _written(dimension: Dimension, value: Any) -> str:
    """A value of the settings as the command line takes it; one of the choices in the words of that choice."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(dimension, Choices) and isinstance(value, float):  # 3.0 is 3
        return next((known for known in dimension.texts if _number(known) == value), text)
    return text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _wrong_combinations(plan: Plan) -> list[str]:
    """What the recipe's settings say of the choices and the ends of the ranges, each problem once."""
    values = {d.key: d.tried_first for d in plan.space.dimensions}
    if math.prod(map(len, values.values())) <= _COMBINATIONS:
        tried = [dict(zip(values, texts, strict=True)) for texts in itertools.product(*values.values())]
    else:
        first = {key: texts[0] for key, texts in values.items()}
        tried = [{**first, key: text} for key, texts in values.items() for text in texts]
    found: dict[str, None] = {}
    for settings in tried:
        try:
            plan.configured(settings)
        except ConfigError as error:
            found |= dict.fromkeys(error.problems)
    return list(found)
