"""One trial of a sweep: a run of the recipe in a folder of its own, and the figure that it is judged by."""

from __future__ import annotations

import difflib
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peftkit.config import Resolved
from peftkit.errors import ConfigError, TrainingError
from peftkit.events import Event, Measured, Phase, Progress, Report
from peftkit.recipe.execute import Result, execute
from peftkit.recipe.files import Recipe
from peftkit.recipe.run import Interrupted
from peftkit.runs import list_runs
from peftkit.runs.contents import CHECKPOINTS, TRAINER, flat_figures, is_interval
from peftkit.runs.records import HELD_OUT

State = Literal["done", "pruned", "failed", "running"]
Stop = Callable[[int, float, dict[int, float]], bool]
"""Step, held-out NLL, and all so far by step → whether the trial should stop."""
_FALLBACK = "evaluation.after.answer_nll"


@dataclass(frozen=True)
class Objective:
    """What a trial is judged by, measured on the held-out rows, with its interval over them where there is one."""

    name: str
    value: float
    direction: Literal["min", "max"]
    low: float | None = None
    high: float | None = None

    @property
    def cost(self) -> float:
        """The value so that less is better."""
        return self.value if self.direction == "min" else -self.value


@dataclass(frozen=True)
class Trial:
    """What is known of a trial; `settings` are those that differ between trials, as the command line takes them."""

    index: int
    settings: dict[str, str]
    state: State
    why: str = ""
    """Why these settings: "the recipe's own", or empty where they were searched."""
    objective: Objective | None = None
    reason: str | None = None
    """Why it failed or was stopped."""
    run: str | None = None
    """The id of its run."""
    seconds: float | None = None
    measured: dict[int, float] = field(default_factory=dict)
    """Held-out NLL by step."""

    def record(self) -> dict[str, Any]:
        """As sweep.json keeps it."""
        return asdict(self)


class UnknownMetric(ConfigError):
    """The run has no figure of the name that the sweep was to choose by."""


class Pruned(Interrupted):
    """A trial was stopped: earlier ones were better after as many steps."""


def objective_of(figures: Mapping[str, Any], metric: str | None = None) -> Objective:
    """The figure that a finished run is judged by: what `metric` names, or what the recipe says is its objective.

    `metric` is a dotted name with its direction, such as `evaluation.after.score.value:max`; without one it is
    `figures["objective"]`, and where a recipe names none the NLL of the answers. Raises UnknownMetric for a name that
    the run does not know, TrainingError for a figure that is not finite.
    """
    if metric is None and isinstance(figures.get("objective"), Mapping):
        said = figures["objective"]
        if said["value"] is None:
            raise TrainingError(f"the run has no {said['name']}: that is no figure to choose by")
        return _finite(Objective(str(said["name"]), float(said["value"]), said["direction"], *_ends(figures, said)))
    name, direction = split_metric(metric) if metric else (_FALLBACK, "min")
    known = {key: value for key, value in flat_figures(figures) if is_interval(value) or type(value) in (int, float)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:8]
        raise UnknownMetric(
            [f"metric {name!r}: the run has no such figure; it has {', '.join(near)}"], where="the sweep"
        )
    found = known[name]
    short = name.removeprefix("evaluation.after.")
    if is_interval(found):
        return _finite(Objective(short, found["point"], direction, found.get("low"), found.get("high")))
    return _finite(Objective(short, float(found), direction))


def split_metric(metric: str) -> tuple[str, Literal["min", "max"]]:
    """A metric's name and direction. Raises ConfigError without one, unless the name tells: a likelihood or a loss."""
    name, colon, direction = metric.rpartition(":")
    if colon and direction == "min":
        return name, "min"
    if colon and direction == "max":
        return name, "max"
    if not colon and metric.endswith(("nll", "loss", "perplexity")):
        return metric, "min"
    raise ConfigError([f"metric {metric!r}: say whether less or more is better: {name or metric}:min or :max"])


def run_trial(
    recipe: Recipe,
    resolved: Resolved[Any],
    folder: Path,
    name: str,
    *,
    registry: Path | None,
    stop: Stop,
    report: Report,
) -> Result:
    """Run the recipe under the name of a trial, in `folder`/runs; its adapter goes to `folder`/registry/`name`.

    `stop` is asked after every measurement. Raises Pruned when it says yes, and what the run raises. Checkpoints are
    removed however it ended: what a trial is for is its figure.
    """
    seen: dict[int, float] = {}

    def watched(event: Event) -> None:
        if isinstance(event, Measured) and event.name == HELD_OUT:
            seen[event.step] = event.value
            if stop(event.step, event.value, seen):
                text = f"pruned after step {event.step}: the held-out NLL, {event.value:.4g}, is above the median"
                raise Pruned(text)
        if isinstance(event, (Phase, Progress)):  # the rest stands in the trial's own folder
            report(event)

    runs, scratch = folder / "runs", folder / "registry" / name
    try:
        return execute(
            replace(recipe, name=name), resolved, registry=registry, publish_to=scratch, runs=runs, report=watched
        )
    finally:
        for run in list_runs(runs):
            if run.recipe == name and run.state != "running":
                for left in (CHECKPOINTS, TRAINER):
                    shutil.rmtree(run.path / left, ignore_errors=True)


def _ends(figures: Mapping[str, Any], said: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The interval of the named objective, where the evaluation holds one of that name and value."""
    for name, value in flat_figures(figures.get("evaluation", {}).get("after", {})):
        if name.rpartition(".")[2] == said["name"] and is_interval(value) and value["point"] == said["value"]:
            return value.get("low"), value.get("high")
    return None, None


def _finite(objective: Objective) -> Objective:
    if not math.isfinite(objective.value):
        raise TrainingError(f"{objective.name} is {objective.value}: that is no figure to choose by")
    return objective
