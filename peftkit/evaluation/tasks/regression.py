"""Numbers given against numbers wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.evaluation.tasks.metric import Measures, Metric, Numbers, Values, divide, from_sums, mean_of
from peftkit.extras import extra

_FLAT = 1e-12
"""A variance below this share of the squares' mean is rounding: the numbers are all the same."""


def regression(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """Root mean squared error, R², Pearson's and Spearman's correlation.

    Where a prompted base names no number, the mean of the numbers that it does name stands in, and a note counts them.
    """
    wanted = np.array([row.target for row in rows], dtype=np.float64)
    given, notes = _numbers([prediction.value for prediction in predictions])
    metrics = (
        Metric("rmse", _library_rmse(wanted, given), _rmse(wanted, given), higher_is_better=False),
        Metric("r2", _library_r2(wanted, given), _r2(wanted, given)),
        Metric("pearson", _library_correlation("pearsonr", wanted, given), _pearson(wanted, given)),
        Metric("spearman", _library_correlation("spearmanr", wanted, given), _spearman(wanted, given)),
    )
    return Measures(metrics, "rmse", np.abs(given - wanted), {}, {}, notes)


def _numbers(values: Sequence[float | str | None]) -> tuple[Numbers, tuple[str, ...]]:
    named = [float(value) for value in values if isinstance(value, int | float)]
    if len(named) == len(values):
        return np.array(named), ()
    stand_in = sum(named) / len(named) if named else float("nan")
    numbers = [float(value) if isinstance(value, int | float) else stand_in for value in values]
    note = f"{len(values) - len(named)} of {len(values)} predictions are no number: the mean of the others stands in"
    return np.array(numbers), (note,)


def _library_rmse(wanted: Numbers, given: Numbers) -> float:
    if np.isnan(given).any():
        return float("nan")
    with extra("tasks", "measuring numbers"):
        from sklearn.metrics import root_mean_squared_error
    return float(root_mean_squared_error(wanted, given))


def _library_r2(wanted: Numbers, given: Numbers) -> float:
    if np.isnan(given).any() or _same(wanted):
        return float("nan")
    with extra("tasks", "measuring numbers"):
        from sklearn.metrics import r2_score
    return float(r2_score(wanted, given))


def _library_correlation(name: str, wanted: Numbers, given: Numbers) -> float:
    """scipy's; not defined where either side is constant, as it is for a baseline that always gives the mean."""
    if np.isnan(given).any() or _same(wanted) or _same(given):
        return float("nan")
    with extra("tasks", "measuring numbers"):
        from scipy import stats
    return float(getattr(stats, name)(wanted, given).statistic)


def _same(values: Numbers) -> bool:
    centred = values - values.mean()
    return bool((centred**2).mean() <= _FLAT * max(float((values**2).mean()), _FLAT))


def _rmse(wanted: Numbers, given: Numbers) -> Values:
    mean = mean_of((wanted - given) ** 2)
    return lambda weights: np.sqrt(mean(weights))


def _r2(wanted: Numbers, given: Numbers) -> Values:
    # Centred on the whole set first: E[y²] − E[y]² of numbers far from 0 would lose their digits.
    y = wanted - wanted.mean()
    columns = np.column_stack([np.ones_like(y), y, y**2, (wanted - given) ** 2])
    scale = float((y**2).mean())

    def value(sums: Numbers) -> Numbers:
        spread = sums[:, 2] - sums[:, 1] ** 2 / sums[:, 0]
        return 1 - divide(sums[:, 3], np.where(spread > _FLAT * scale * sums[:, 0], spread, 0.0))

    return from_sums(columns, value)


def _pearson(wanted: Numbers, given: Numbers) -> Values:
    x, y = wanted - wanted.mean(), given - given.mean()
    columns = np.column_stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    scales = float((x * x).mean()), float((y * y).mean())

    def value(sums: Numbers) -> Numbers:
        n, sx, sy, sxx, syy, sxy = sums.T
        spreads = sxx - sx**2 / n, syy - sy**2 / n
        flat = (spreads[0] <= _FLAT * scales[0] * n) | (spreads[1] <= _FLAT * scales[1] * n)
        root = np.sqrt(np.where(flat, 0.0, spreads[0])) * np.sqrt(np.where(flat, 0.0, spreads[1]))
        return np.clip(divide(sxy - sx * sy / n, root), -1.0, 1.0)

    return from_sums(columns, value)


def _spearman(wanted: Numbers, given: Numbers) -> Values:
    def value(weights: Numbers) -> Numbers:
        n = weights.sum(axis=1)
        x, y = _ranks(wanted, weights), _ranks(given, weights)
        # The mean of midranks is (n + 1) / 2 whatever the ties.
        x, y = x - (n[:, None] + 1) / 2, y - (n[:, None] + 1) / 2
        covariance = (weights * x * y).sum(axis=1)
        root = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
        return np.clip(divide(covariance, root), -1.0, 1.0)

    return value


def _ranks(values: Numbers, weights: Numbers) -> Numbers:
    """Midranks (draws × rows) of the values where row i occurs weights[:, i] times."""
    distinct, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(distinct.size))
    times = np.add.reduceat(weights[:, order], starts, axis=1)
    before = np.cumsum(times, axis=1) - times
    ranks: Numbers = (before + (times + 1) / 2)[:, place]
    return ranks
