"""One figure over a set of rows that can be computed again for any resample of them, many resamples at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Values = Callable[[Numbers], Numbers]
"""Weights (draws × rows: how often each row was drawn) → the figure for each draw, nan where it is not defined."""


@dataclass(frozen=True)
class Metric:
    """A figure of one contestant."""

    name: str
    point: float
    """On all rows, as the library gives it; nan where it is not defined."""
    values: Values
    higher_is_better: bool = True
    mean_of_shares: bool = False
    """Whether it is the mean over rows of figures from 0 to 1: at 0 and 1 resampling sees no spread, Wilson does."""


@dataclass(frozen=True)
class Measures:
    """All that is known of one contestant before anything is resampled."""

    metrics: tuple[Metric, ...]
    primary: str
    per_row: Numbers
    """The row's own score: 1 or 0 for right or wrong, the share of words tagged right, |error| of a number, F1
    of an answer, chrF (0–100) of a translation, ROUGE-L of a summary."""
    labels: dict[str, dict[str, float | None]]
    """Precision, recall, F1 and support of each label or span type."""
    signatures: dict[str, str]
    """How a library computed its figure, in its own notation."""
    notes: tuple[str, ...] = ()


def mean_of(per_row: Numbers) -> Values:
    """The mean over rows."""
    return lambda weights: divide(weights @ per_row, weights.sum(axis=1))


def from_sums(counts: Any, value: Callable[[Numbers], Numbers]) -> Values:
    """A figure of the column sums (draws × columns) of `counts` (rows × columns, dense or scipy sparse)."""
    return lambda weights: value(weights @ counts)


def divide(part: Numbers, whole: Numbers) -> Numbers:
    """part / whole, nan where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole == 0, np.nan, part / whole)


def mean_defined(values: Numbers) -> Numbers:
    """The mean over the last axis of what is not nan; nan where nothing is."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))


def f1(hits: Numbers, given: Numbers, wanted: Numbers) -> Numbers:
    """2·hits / (given + wanted), nan where nothing was given or wanted."""
    return divide(2 * hits, given + wanted)


def table(names: tuple[str, ...], hits: Numbers, given: Numbers, wanted: Numbers) -> dict[str, dict[str, float | None]]:
    """Precision, recall, F1 and support by name; None where a figure is not defined."""
    figures = {"precision": divide(hits, given), "recall": divide(hits, wanted), "f1": f1(hits, given, wanted)}
    lines: dict[str, dict[str, float | None]] = {}
    for i, name in enumerate(names):
        lines[name] = {key: None if np.isnan(column[i]) else float(column[i]) for key, column in figures.items()}
        lines[name]["support"] = float(wanted[i])
    return lines
