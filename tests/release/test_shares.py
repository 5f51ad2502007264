"""The share kept and its interval, against a bootstrap written out with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peftkit.errors import DataError
from peftkit.release.shares import share_kept

BASE = [30.0, 22.0, 41.0, 18.0, 25.0]
PARENT = [12.0, 15.0, 20.0, 17.0, 11.0]


def loops(base: list[float], parent: list[float], candidate: list[float], seed: int, resamples: int) -> list[float]:
    """Sorted ratios of sums, one resample at a time, with the draws of the same generator."""
    n = len(base)
    drawn = np.random.default_rng(seed).integers(0, n, size=(resamples, n)).tolist()
    ratios = []
    for rows in drawn:
        gained = math.fsum(base[i] - parent[i] for i in rows)
        kept = math.fsum(base[i] - candidate[i] for i in rows)
        ratios.append(kept / gained if gained > 0 else -math.inf)
    return sorted(ratios)


def test_all_nothing_half_and_more_than_all_is_kept() -> None:
    half = [(a + b) / 2 for a, b in zip(BASE, PARENT, strict=True)]
    beyond = [2 * b - a for a, b in zip(BASE, PARENT, strict=True)]
    for candidate, share in ((PARENT, 1.0), (BASE, 0.0), (half, 0.5), (beyond, 2.0)):
        found = share_kept(BASE, PARENT, candidate)
        assert (found.point, found.low, found.high) == pytest.approx((share, share, share), abs=1e-12)


def test_a_worked_share() -> None:
    """The parent gains 61 of 136 nats, the candidate 42."""
    assert share_kept(BASE, PARENT, [20.0, 16.0, 25.0, 18.0, 15.0]).point == 42 / 61


def test_the_ends_are_those_of_the_loops() -> None:
    candidate = [20.0, 16.0, 25.0, 18.0, 15.0]
    found = share_kept(BASE, PARENT, candidate, seed=3, resamples=2000)
    ratios = loops(BASE, PARENT, candidate, 3, 2000)
    # The 2.5 % and 97.5 % order statistics of 2,000: positions 0.025 · 1999 rounded outwards.
    assert (found.low, found.high) == pytest.approx((ratios[49], ratios[1950]), abs=1e-12)
    assert found.n == 5


def test_rows_of_several_examples_are_drawn_together() -> None:
    """Two examples of a row are worth one row with their sums."""
    doubled = [value / 2 for value in BASE for _ in "ab"], [value / 2 for value in PARENT for _ in "ab"]
    candidate = [20.0, 16.0, 25.0, 18.0, 15.0]
    found = share_kept(*doubled, [v / 2 for v in candidate for _ in "ab"], groups=[str(i // 2) for i in range(10)])
    alone = share_kept(BASE, PARENT, candidate)
    assert (found.point, found.low, found.high) == pytest.approx((alone.point, alone.low, alone.high), abs=1e-12)


def test_a_gain_that_is_hardly_there_promises_nothing() -> None:
    """In many resamples this parent gains nothing, and the share is then −∞, not a large number."""
    base, parent = [10.0, 10.0, 10.0, 10.0], [9.0, 10.5, 9.0, 10.5]
    found = share_kept(base, parent, parent)
    assert found.point == 1.0
    assert found.low == -math.inf


def test_one_row_says_nothing_about_the_spread() -> None:
    found = share_kept([4.0], [2.0], [3.0])
    assert (found.point, found.low, found.high) == (0.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1.0], [2.0], [1.0]), "gains nothing"),
        (([1.0], [1.0], [1.0]), "gains nothing"),
        (([1.0, 2.0], [0.5], [1.0, 1.0]), "columns of shapes"),
        (([], [], []), "columns of shapes"),
        (([1.0], [0.5], [math.nan]), "not finite"),
    ],
)
def test_what_has_no_share_is_an_error(columns: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        share_kept(*columns)
