"""From rows and predictions to figures with intervals, and to differences between two contestants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskName, TaskRow
from peftkit.errors import ConfigError
from peftkit.evaluation.compare import Interval
from peftkit.evaluation.tasks.answers import extractive
from peftkit.evaluation.tasks.checked import check
from peftkit.evaluation.tasks.labels import multi_label, single_label
from peftkit.evaluation.tasks.metric import Measures, Metric
from peftkit.evaluation.tasks.regression import regression
from peftkit.evaluation.tasks.resample import draw, interval, metric_interval, record
from peftkit.evaluation.tasks.spans import tokens
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.evaluation.tasks.texts import summarization, translation

_Measure = Callable[[Head, Sequence[TaskRow], Sequence[Prediction]], Measures]
_TASKS: dict[TaskName, _Measure] = {
    "text_classification": single_label,
    "image_classification": single_label,
    "regression": regression,
    "token_classification": tokens,
    "extractive_qa": extractive,
    "translation": translation,
    "summarization": summarization,
}


@dataclass(frozen=True)
class Scores:
    """The figures of one contestant on one set of rows."""

    metrics: dict[str, Interval | None]
    """By name; None where the figure is not defined on these rows (`notes` say why)."""
    primary: str
    """What contestants are ranked by."""
    higher_is_better: bool
    """Of the primary metric."""
    per_row: list[float] | None
    """See `Measures.per_row`."""
    n: int
    labels: dict[str, dict[str, float | None]]
    """Precision, recall, F1 and support of each label or span type."""
    signatures: dict[str, str]
    notes: tuple[str, ...]

    @property
    def value(self) -> float | None:
        """The primary metric; None where it is not defined."""
        found = self.metrics[self.primary]
        return found.point if found else None

    def record(self) -> dict[str, Any]:
        """For the manifest: figures and the names of labels, no rows."""
        figures: dict[str, Any] = {name: record(found) for name, found in self.metrics.items()}
        figures |= {"rows": self.n, "metric": self.primary}
        optional = {"labels": self.labels, "signatures": self.signatures, "notes": list(self.notes)}
        return figures | {name: value for name, value in optional.items() if value}


def measure(task: TaskName, head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """Every metric of the task, ready to be resampled. Raises DataError for rows and predictions that do not fit."""
    check(task, head, rows, predictions)
    if head.problem == "multi_label" and head.kind in ("sequence", "image"):
        return multi_label(head, rows, predictions)
    return _TASKS[task](head, rows, predictions)


def score(
    task: TaskName,
    head: Head,
    rows: Sequence[TaskRow],
    predictions: Sequence[Prediction],
    spec: TaskEvaluateSpec,
) -> Scores:
    """Every metric of the task with its 95 % interval: percentile bootstrap over rows (`units`), paired by the seed.

    A metric of the set is computed again for every draw. Raises DataError for rows and predictions that do not fit,
    ConfigError for a metric that the task does not have.
    """
    measures = measure(task, head, rows, predictions)
    primary = chosen(measures, spec)
    members = units(task, rows)
    draws = draw([metric.values for metric in measures.metrics], members, spec.seed, spec.resamples)
    count = len(set(members))
    pairs = zip(measures.metrics, draws, strict=True)
    found = {metric.name: metric_interval(metric, drawn, count) for metric, drawn in pairs}
    notes = (*measures.notes, *_undefined(found), *_one_unit(count), *_flat(found))
    return Scores(
        metrics=found,
        primary=primary.name,
        higher_is_better=primary.higher_is_better,
        per_row=measures.per_row.tolist() if all(map(math.isfinite, measures.per_row)) else None,
        n=len(rows),
        labels=measures.labels,
        signatures=measures.signatures,
        notes=notes,
    )


def difference(
    task: TaskName,
    head: Head,
    rows: Sequence[TaskRow],
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    metric: str,
    spec: TaskEvaluateSpec,
) -> Interval | None:
    """`metric` of `after` minus that of `before` on the same rows and draws; None where either is not defined.

    Raises as `score` does, and ConfigError where either contestant does not have the metric.
    """
    a, b = (named(measure(task, head, rows, side), metric) for side in (before, after))
    members = units(task, rows)
    first, second = draw([a.values, b.values], members, spec.seed, spec.resamples)
    return interval(b.point - a.point, second - first, len(set(members)))


def units(task: TaskName, rows: Sequence[TaskRow]) -> list[int]:
    """What is drawn as a whole: a row; of questions, all those about one passage, which are hard or easy together."""
    if task != "extractive_qa":
        return list(range(len(rows)))
    codes: dict[str, int] = {}
    return [codes.setdefault(row.text, len(codes)) for row in rows]


def chosen(measures: Measures, spec: TaskEvaluateSpec) -> Metric:
    """The metric that ranks. Raises ConfigError for one that the task does not have."""
    return named(measures, measures.primary if spec.metric == "auto" else spec.metric)


def named(measures: Measures, name: str) -> Metric:
    """The metric called `name`. Raises ConfigError naming those that there are."""
    for metric in measures.metrics:
        if metric.name == name:
            return metric
    known = ", ".join(metric.name for metric in measures.metrics)
    raise ConfigError([f"metric = {name}: not among this task's figures"], hint=f"metric: auto, or one of {known}")


def _undefined(found: dict[str, Interval | None]) -> list[str]:
    missing = [name for name, value in found.items() if value is None]
    reason = "nothing was given or wanted, or the numbers are all the same"
    return [f"{', '.join(missing)}: not defined on these rows ({reason})"] if missing else []


def _flat(found: dict[str, Interval | None]) -> list[str]:
    flat = [name for name, value in found.items() if value and value.low == value.high]
    return [f"{', '.join(flat)}: every draw gives the same figure, so the interval shows no spread"] if flat else []


def _one_unit(count: int) -> list[str]:
    return ["one row (or one passage) says nothing about the spread: the intervals are infinite"] if count == 1 else []
