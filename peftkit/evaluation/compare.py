"""How sure a mean or a before-and-after difference is: paired bootstrap intervals, and Wilson's for counts.

Both models are scored on the same rows, so the rows are resampled together and what makes a row easy or hard cancels.
The intervals speak of other rows from the same source; they say nothing of other training seeds (run ≥ 3 and compare).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftkit.errors import ConfigError, DataError

Numbers = NDArray[np.float64]

BLOCK = 1 << 20
"""Row draws held at once: about 24 MiB of indices and gathered values, whatever the number of rows."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval, in the unit of what was estimated.

    `n` counts what was resampled: rows, or groups where groups were given. One row says nothing about the spread, so
    n = 1 gives (-inf, inf), which excludes nothing (write it to JSON as null: JSON has no infinity).
    """

    point: float
    low: float
    high: float
    level: float = 0.95
    n: int = field(kw_only=True)

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside the interval, its ends included."""
        return value < self.low or value > self.high


def paired_nll(
    before: ArrayLike,
    after: ArrayLike,
    tokens: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
) -> Interval:
    """The change of the token-weighted NLL, after - before, in nats per token: negative is an improvement.

    `before` and `after` are each row's NLL summed over its answer tokens (nats), `tokens` the counts. The ratio of sums
    is recomputed for each resample (percentile bootstrap, Efron & Tibshirani 1993, ch. 13); rows that share a group
    are drawn together (Miller, arXiv 2411.00640). Raises DataError for unequal lengths, no rows, a value that is not
    finite and a row without tokens; ConfigError for a level or a number of resamples out of range.
    """
    arrays = _columns(before=before, after=after, tokens=tokens)
    _check_tokens(arrays["tokens"])
    return _bootstrap(arrays["after"] - arrays["before"], arrays["tokens"], seed, resamples, groups, level)


def mean_nll(
    nll: ArrayLike,
    tokens: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
) -> Interval:
    """The token-weighted NLL of one model, Σ nll / Σ tokens, in nats per token; raises as `paired_nll` does."""
    arrays = _columns(nll=nll, tokens=tokens)
    _check_tokens(arrays["tokens"])
    return _bootstrap(arrays["nll"], arrays["tokens"], seed, resamples, groups, level)


def paired_mean(
    before: ArrayLike,
    after: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
) -> Interval:
    """The mean change of a score per row, after - before, in the score's unit: positive is an improvement.

    Every row weighs the same, in whichever group it is. Raises as `paired_nll` does.
    """
    arrays = _columns(before=before, after=after)
    change = arrays["after"] - arrays["before"]
    return _bootstrap(change, np.ones_like(change), seed, resamples, groups, level)


def mean(
    scores: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
) -> Interval:
    """The mean of a score per row, in the score's unit; raises as `paired_nll` does.

    Scores that are all alike have a bootstrap interval of width zero: for an accuracy of 0 % or 100 % use `wilson`.
    """
    values = _columns(scores=scores)["scores"]
    return _bootstrap(values, np.ones_like(values), seed, resamples, groups, level)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The share of successes among n independent rows with Wilson's score interval (JASA 22, 1927), no correction.

    Holds its level at 0 % and 100 %, where resampling sees no spread at all. Raises DataError unless 0 ≤ successes ≤ n
    and n ≥ 1, ConfigError for a level out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} successes in {n} rows", expected="at least one row, and 0 <= successes <= rows")
    _check_settings(level, 1)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the two ends the formula gives 0 and 1 exactly; floating point need not.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, level, n=n)


def _columns(**columns: Any) -> dict[str, Numbers]:
    """The arguments as float64 vectors of one length; raises DataError naming the argument and the row."""
    arrays: dict[str, Numbers] = {}
    for name, values in columns.items():
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"`{name}` is not a list of numbers: {error}", expected="one number per row") from error
        if array.ndim != 1:
            raise DataError(f"`{name}` has shape {array.shape}", expected="one number per row")
        if (bad := np.flatnonzero(~np.isfinite(array))).size:
            raise DataError(
                f"{bad.size} of {array.size} values of `{name}` are not finite, first {array[bad[0]]} in row {bad[0]}",
                expected="finite numbers",
                hint="leave such rows out of both models, and say how many",
            )
        arrays[name] = array
    lengths = {name: array.size for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"rows do not pair up: {lengths}", expected="the same rows, in the same order, in each")
    if 0 in lengths.values():
        raise DataError("there are no rows", expected="at least one row")
    return arrays


def _check_tokens(tokens: Numbers) -> None:
    if (bad := np.flatnonzero(tokens <= 0)).size:
        raise DataError(
            f"{bad.size} of {tokens.size} rows have no answer tokens, first {tokens[bad[0]]:g} in row {bad[0]}",
            expected="at least one answer token in each row",
            hint="leave rows whose answer was cut off entirely out of both models, and say how many",
        )


def _check_settings(level: float, resamples: int) -> None:
    problems = []
    if not 0 < level < 1:
        problems.append(f"level = {level}: must lie between 0 and 1")
    if resamples < 1:
        problems.append(f"resamples = {resamples}: must be at least 1")
    if problems:
        raise ConfigError(problems, where="the interval")


def _bootstrap(
    numerator: Numbers,
    denominator: Numbers,
    seed: int,
    resamples: int,
    groups: Sequence[str] | None,
    level: float,
) -> Interval:
    """Percentile bootstrap of Σ numerator / Σ denominator over rows, or over whole groups."""
    _check_settings(level, resamples)
    point = float(numerator.sum() / denominator.sum())
    if groups is not None:
        if len(groups) != numerator.size:
            raise DataError(f"{len(groups)} groups for {numerator.size} rows", expected="one group for each row")
        # A group enters a resample whole, so its two sums are all that is needed of it.
        code: dict[str, int] = {}
        codes = np.array([code.setdefault(group, len(code)) for group in groups])
        numerator = np.asarray(np.bincount(codes, weights=numerator), dtype=np.float64)
        denominator = np.asarray(np.bincount(codes, weights=denominator), dtype=np.float64)
    n = numerator.size
    if n == 1:
        return Interval(point, -math.inf, math.inf, level, n=1)
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // n)
    ratios = np.empty(resamples)
    for start in range(0, resamples, block):
        drawn = random.integers(0, n, size=(min(block, resamples - start), n))
        ratios[start : start + block] = numerator[drawn].sum(axis=1) / denominator[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, float(low), float(high), level, n=n)
