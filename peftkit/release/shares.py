"""How much of what an adapter gained on its rows another model keeps, with a bootstrap interval over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftkit.errors import DataError
from peftkit.evaluation.compare import BLOCK, Interval

Numbers = NDArray[np.float64]


def share_kept(
    base: ArrayLike,
    parent: ArrayLike,
    candidate: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """(NLL of the base − NLL of the candidate) / (NLL of the base − NLL of the parent), from summed NLL per example.

    1 keeps all that the parent gained, 0 is the base, more than 1 is better than the parent. Percentile bootstrap: the
    three columns are resampled together, examples of one group as a whole, and the ratio of sums is taken again. A
    resample in which the parent gains nothing counts as −∞, so a gain that is hardly there never passes. The ends are
    order statistics, the outer ones, without interpolation. Raises DataError for columns that do not pair up, values
    that are not finite, and a parent that gains nothing over all rows.
    """
    columns = [np.asarray(values, dtype=np.float64) for values in (base, parent, candidate)]
    if any(column.ndim != 1 or column.shape != columns[0].shape or not column.size for column in columns):
        raise DataError(f"columns of shapes {[column.shape for column in columns]}", expected="one NLL per row in each")
    if not all(np.isfinite(column).all() for column in columns):
        raise DataError("an NLL is not finite", expected="finite numbers")
    gained, kept = columns[0] - columns[1], columns[0] - columns[2]
    if gained.sum() <= 0:
        raise DataError("the parent gains nothing on these rows", expected="a parent that is better than the base")
    point = float(kept.sum() / gained.sum())
    if groups is not None:
        codes = np.unique(np.asarray(groups), return_inverse=True)[1]
        gained, kept = (np.bincount(codes, weights=column).astype(np.float64) for column in (gained, kept))
    n = gained.size
    if n == 1:
        return Interval(point, -math.inf, math.inf, level, n=1)
    ratios = _resampled(kept, gained, seed, resamples)
    low = float(np.quantile(ratios, (1 - level) / 2, method="lower"))
    high = float(np.quantile(ratios, (1 + level) / 2, method="higher"))
    return Interval(point, low, high, level, n=n)


def _resampled(kept: Numbers, gained: Numbers, seed: int, resamples: int) -> Numbers:
    random = np.random.default_rng(seed)
    n = gained.size
    block = max(1, BLOCK // n)
    ratios = np.empty(resamples)
    for start in range(0, resamples, block):
        drawn = random.integers(0, n, size=(min(block, resamples - start), n))
        whole = gained[drawn].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = kept[drawn].sum(axis=1) / whole
        ratios[start : start + block] = np.where(whole > 0, found, -np.inf)
    return ratios
