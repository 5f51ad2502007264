"""The draws that every contestant shares: rows, or groups of rows that belong together, with replacement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from peftkit.evaluation.compare import BLOCK, Interval, wilson
from peftkit.evaluation.tasks.metric import Metric, Numbers, Values

LEVEL = 0.95


def weights(units: Sequence[int], seed: int, resamples: int) -> Iterator[Numbers]:
    """How often each row is drawn, in blocks (draws × rows); `units` gives each row its unit, drawn as a whole.

    The draws depend on the units, the seed and the number of resamples only: contestants measured on the same rows
    meet the same draws, so their differences are paired.
    """
    codes = np.unique(np.asarray(units), return_inverse=True)[1]
    count = int(codes.max()) + 1
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // max(count, codes.size))
    for start in range(0, resamples, block):
        draws = min(block, resamples - start)
        drawn = random.integers(0, count, size=(draws, count)) + count * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
        yield times[:, codes].astype(np.float64)


def draw(values: Sequence[Values], units: Sequence[int], seed: int, resamples: int) -> list[Numbers]:
    """Each figure for every draw."""
    found: list[list[Numbers]] = [[] for _ in values]
    for block in weights(units, seed, resamples):
        for i, value in enumerate(values):
            found[i].append(value(block))
    return [np.concatenate(parts) for parts in found]


def interval(point: float, draws: Numbers, units: int) -> Interval | None:
    """The percentile interval over the draws for which the figure is defined; None where it is not on all rows.

    One unit says nothing about the spread, nor do draws of which fewer than half are defined: (-inf, inf).
    """
    if math.isnan(point):
        return None
    defined = draws[~np.isnan(draws)]
    if units < 2 or 2 * defined.size < draws.size:
        return Interval(point, -math.inf, math.inf, LEVEL, n=units)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(point, float(low), float(high), LEVEL, n=units)


def metric_interval(metric: Metric, draws: Numbers, units: int) -> Interval | None:
    """`interval`, and Wilson's where all rows are right or all wrong, where a resample sees no spread."""
    if metric.mean_of_shares and units > 1 and metric.point in (0.0, 1.0):
        return wilson(round(metric.point * units), units, LEVEL)
    return interval(metric.point, draws, units)


def record(found: Interval | None) -> dict[str, Any] | None:
    """An interval for JSON: what is not finite becomes null."""
    if found is None:
        return None
    ends = {"point": found.point, "low": found.low, "high": found.high}
    return {name: end if math.isfinite(end) else None for name, end in ends.items()}
