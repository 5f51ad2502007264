"""A metric by the values of a column: each group with its interval, and the gaps between groups.

By-group values, their difference (largest minus smallest) and ratio (smallest over largest) are fairlearn's
MetricFrame; the intervals come from the draws of all rows together, so a group's size varies as it would in other rows.
The gap between the extremes of several groups is never negative: `chance` says how often a random assignment of the
same group sizes gives one as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskName, TaskRow
from peftkit.errors import ConfigError
from peftkit.evaluation.compare import Interval
from peftkit.evaluation.tasks.labels import rates
from peftkit.evaluation.tasks.metric import Numbers, Values
from peftkit.evaluation.tasks.resample import draw, interval, record
from peftkit.evaluation.tasks.scores import chosen, measure, units
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.extras import extra

SMALL = 10
"""A group of fewer rows is flagged: its figure says little."""
SHUFFLES = 500
COLUMNS = ("", "rows", "value", "95 %", "")


@dataclass(frozen=True)
class Group:
    """The rows that share a value of the column."""

    name: str
    n: int
    value: Interval | None

    @property
    def small(self) -> bool:
        """Whether there are too few rows to say much."""
        return self.n < SMALL


@dataclass(frozen=True)
class Slices:
    """One metric by one column."""

    column: str
    metric: str
    groups: tuple[Group, ...]
    difference: Interval | None
    """Largest minus smallest value of a group; None with fewer than two groups that have one."""
    ratio: Interval | None
    """Smallest over largest value of a group."""
    chance: float | None
    """Share of random assignments of the same group sizes whose difference is at least as large."""
    gaps: dict[str, Interval | None]
    """Of binary labels, the second being the positive one: `demographic_parity`, the gap between selection rates, and
    `equalised_odds`, max(|ΔTPR|, |ΔFPR|). None where fewer than two groups have the rates."""

    def table(self) -> list[tuple[Any, ...]]:
        """One line per group, then the gaps; the columns are `COLUMNS`."""
        lines: list[tuple[Any, ...]] = [
            (group.name, group.n, *_shown(group.value), f"fewer than {SMALL} rows" if group.small else "")
            for group in self.groups
        ]
        chance = "" if self.chance is None else f"by chance in {self.chance:.0%} of shufflings"
        lines.append(("largest − smallest", "", *_shown(self.difference), chance))
        lines.append(("smallest / largest", "", *_shown(self.ratio), ""))
        return lines + [(name.replace("_", " ") + " gap", "", *_shown(gap), "") for name, gap in self.gaps.items()]

    def record(self) -> dict[str, Any]:
        """For the manifest: no group is named, since a column may hold names of people."""
        values = sorted(group.value.point for group in self.groups if group.value)
        return {
            "metric": self.metric,
            "groups": len(self.groups),
            "small_groups": sum(group.small for group in self.groups),
            "lowest": values[0] if values else None,
            "median": values[len(values) // 2] if values else None,
            "highest": values[-1] if values else None,
            "difference": record(self.difference),
            "ratio": record(self.ratio),
            "chance": self.chance,
            **{f"{name}_gap": record(gap) for name, gap in self.gaps.items()},
        }


def by_column(
    task: TaskName,
    head: Head,
    rows: Sequence[TaskRow],
    predictions: Sequence[Prediction],
    column: str,
    spec: TaskEvaluateSpec,
) -> Slices:
    """The metric that ranks, by the values of `column`. Raises ConfigError where a row has no such column."""
    check_columns(rows, (column,))
    metric = chosen(measure(task, head, rows, predictions), spec)
    values = [str(row.columns[column]) for row in rows]
    names = sorted(set(values))
    members = np.array([[float(value == name) for value in values] for name in names])
    unit = np.array(units(task, rows))
    count = np.unique(unit).size
    points = _points(metric.values, values)
    draws = np.column_stack(
        draw([_within(metric.values, member) for member in members], unit.tolist(), spec.seed, spec.resamples)
    )
    groups = tuple(
        Group(name, int(member.sum()), interval(points.groups[name], draws[:, i], np.unique(unit[member > 0]).size))
        for i, (name, member) in enumerate(zip(names, members, strict=True))
    )
    several = sum(not math.isnan(point) for point in points.groups.values()) > 1
    return Slices(
        column=column,
        metric=metric.name,
        groups=groups,
        difference=interval(points.difference, _spread(draws), count) if several else None,
        ratio=interval(points.ratio, _ratio(draws), count) if several else None,
        chance=_chance(metric.values, members, points.difference, spec.seed) if several else None,
        gaps=_binary_gaps(head, rows, predictions, members, task, spec),
    )


def check_columns(rows: Sequence[TaskRow], columns: Sequence[str]) -> None:
    """Raises ConfigError for columns that rows lack, naming those that every row has."""
    shared = set(rows[0].columns).intersection(*(row.columns for row in rows)) if rows else set()
    problems = []
    for column in columns:
        lacking = [row for row in rows if column not in row.columns]
        if lacking:
            problems.append(
                f"slices: {len(lacking)} of {len(rows)} rows have no column {column!r}, first {lacking[0].where}"
            )
    if problems:
        known = ", ".join(sorted(shared)) or "none besides the text and the label"
        raise ConfigError(problems, hint=f"columns that every row has: {known}")


@dataclass(frozen=True)
class _Points:
    groups: dict[str, float]
    difference: float
    ratio: float


def _points(values: Values, column: Sequence[str]) -> _Points:
    """What fairlearn's MetricFrame gives; it hands each group the indices of its rows."""
    with extra("tasks", "measuring by a column"):
        from fairlearn.metrics import MetricFrame

    def of_rows(wanted: Any, given: Any) -> float:
        weights = np.zeros((1, len(column)))
        weights[0, np.asarray(wanted, dtype=np.int64)] = 1.0
        return float(values(weights)[0])

    index = np.arange(len(column))
    frame = MetricFrame(metrics=of_rows, y_true=index, y_pred=index, sensitive_features=np.array(column, dtype=object))
    groups = {str(name): float(value) for name, value in frame.by_group.items()}
    return _Points(groups, float(frame.difference()), float(frame.ratio()))


def _within(values: Values, member: Numbers) -> Values:
    """The metric of the rows of a group."""

    def value(weights: Numbers) -> Numbers:
        inside = weights * member
        # A draw may leave a group empty: not every metric can say what it is of no rows.
        found = np.full(len(inside), np.nan)
        some = inside.any(axis=1)
        if some.any():
            found[some] = values(inside[some])
        return found

    return value


def _spread(groups: Numbers) -> Numbers:
    """Largest minus smallest over the groups (draws × groups); nan where fewer than two have a value."""
    high, low = _extremes(groups)
    return high - low


def _ratio(groups: Numbers) -> Numbers:
    high, low = _extremes(groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(high == 0, np.nan, low / high)


def _extremes(groups: Numbers) -> tuple[Numbers, Numbers]:
    few = (~np.isnan(groups)).sum(axis=1) < 2
    high = np.where(np.isnan(groups), -np.inf, groups).max(axis=1)
    low = np.where(np.isnan(groups), np.inf, groups).min(axis=1)
    return np.where(few, np.nan, high), np.where(few, np.nan, low)


def _chance(values: Values, members: Numbers, observed: float, seed: int) -> float:
    """One-sided permutation test, the observed assignment counted as one of them."""
    random = np.random.default_rng(seed)
    drawn = np.array([values(members[:, random.permutation(members.shape[1])]) for _ in range(SHUFFLES)])
    as_large = int((_spread(drawn) >= observed - 1e-12).sum())
    return (as_large + 1) / (SHUFFLES + 1)


def _binary_gaps(
    head: Head,
    rows: Sequence[TaskRow],
    predictions: Sequence[Prediction],
    members: Numbers,
    task: TaskName,
    spec: TaskEvaluateSpec,
) -> dict[str, Interval | None]:
    """Empty unless the head tells two labels apart.

    fairlearn takes a rate of a group without such rows as 0; here it is not defined, and the group is left out of the
    gap: a group without positives has no true positive rate to fall behind with.
    """
    if head.kind not in ("sequence", "image") or head.problem != "single_label" or len(head.labels) != 2:
        return {}
    positive = head.labels[1]
    wanted = np.array([float(row.target == positive) for row in rows])
    chosen_ = np.array([float(prediction.value == positive) for prediction in predictions])

    def parity(weights: Numbers) -> Numbers:
        return _spread(np.column_stack([rates(wanted, chosen_, weights * member)[0] for member in members]))

    def odds(weights: Numbers) -> Numbers:
        each = [rates(wanted, chosen_, weights * member) for member in members]
        return np.fmax(*(_spread(np.column_stack([rate[i] for rate in each])) for i in (1, 2)))

    found: dict[str, Interval | None] = {}
    everything = np.ones((1, len(rows)))
    drawn = draw([parity, odds], units(task, rows), spec.seed, spec.resamples)
    for name, gap, draws in zip(("demographic_parity", "equalised_odds"), (parity, odds), drawn, strict=True):
        found[name] = interval(float(gap(everything)[0]), draws, len(set(units(task, rows))))
    return found


def _shown(found: Interval | None) -> tuple[str, str]:
    if found is None:
        return "not defined", ""
    return f"{found.point:.3f}", "" if math.isinf(found.low) else f"{found.low:.3f} … {found.high:.3f}"
