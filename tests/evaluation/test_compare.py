"""Intervals: hand-worked and published values, agreement with scipy, and coverage where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import ConfigError, DataError
from peftkit.evaluation import compare
from peftkit.evaluation.compare import Interval, mean, mean_nll, paired_mean, paired_nll, wilson


def rows(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 51, size=n)
    before = tokens * random.gamma(4.0, 0.5, size=n)
    return before, before + tokens * random.normal(-0.1, 0.3, size=n), tokens


def test_the_point_is_a_ratio_of_sums_and_improvement_is_negative():
    # before (6 + 4) / 5 = 2.0 nats per token, after (3 + 5) / 5 = 1.6; a mean of row means would give 2.5 - 2.25.
    change = paired_nll([6.0, 4.0], [3.0, 5.0], [4, 1])
    assert change.point == pytest.approx(-0.4)
    assert mean_nll([6.0, 4.0], [4, 1]).point == pytest.approx(2.0)
    assert mean_nll([3.0, 5.0], [4, 1]).point == pytest.approx(1.6)


def test_a_better_score_is_positive():
    change = paired_mean([0, 0, 1, 1], [1, 1, 1, 0])
    assert change.point == pytest.approx(0.25)
    assert mean([1, 1, 1, 0]).point == pytest.approx(0.75)


def test_swapping_before_and_after_mirrors_the_interval():
    before, after, tokens = rows(1)
    there, back = paired_nll(before, after, tokens), paired_nll(after, before, tokens)
    assert (back.point, back.low, back.high) == pytest.approx((-there.point, -there.high, -there.low), rel=1e-12)


def test_pairing_narrows_the_interval():
    before, after, tokens = rows(2)
    paired = paired_nll(before, after, tokens)
    single = mean_nll(before, tokens)
    assert paired.high - paired.low < (single.high - single.low) / 2


@pytest.mark.parametrize("shift", [0.0, -0.25])
def test_a_constant_shift_has_no_width(shift):
    before, _, tokens = rows(3)
    change = paired_nll(before, before + shift * tokens, tokens)
    # 60 sums of values below 300: rounding stays far below 1e-12.
    assert (change.low, change.point, change.high) == pytest.approx((shift, shift, shift), abs=1e-12)
    assert change.excludes(0.0) == (shift != 0.0)


def test_agrees_with_scipy_on_the_ratio():
    before, after, tokens = rows(4)

    def ratio(change, count, axis=-1):
        return change.sum(axis=axis) / count.sum(axis=axis)

    theirs = scipy.stats.bootstrap(
        (after - before, tokens.astype(float)),
        ratio,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(11),
    )
    ours = paired_nll(before, after, tokens, seed=12, resamples=20_000)
    # Two independent bootstraps: a 2.5 % quantile of 20,000 draws has a standard error of sqrt(.025 · .975 / 20000) /
    # φ(1.96) = 0.019 bootstrap standard errors; their difference 0.027; five of those.
    slack = 5 * 0.027 * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=slack)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=slack)


def test_agrees_with_scipy_on_the_mean():
    scores = np.random.default_rng(5).random(80)
    theirs = scipy.stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(6)
    )
    ours = mean(scores, resamples=20_000)
    slack = 5 * 0.027 * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=slack)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=slack)


def covered(simulations: int, *, clustered: bool, with_groups: bool) -> float:
    """The share of intervals that hold the true change; the change depends on the length, as in real rows."""
    hits = 0
    for seed in range(simulations):
        random = np.random.default_rng(seed)
        tokens = random.integers(5, 51, size=120)
        noise = random.normal(0.0, 4.0, size=120)
        groups = [str(row // 6) for row in range(120)]
        if clustered:
            noise += np.repeat(random.normal(0.0, 8.0, size=20), 6)
        # E[change] = -0.1 · 27.5 + 0.3 · 0, so the change per token is -0.1.
        change = -0.1 * tokens + 0.3 * (tokens - 27.5) + noise
        before = tokens * 2.0
        interval = paired_nll(
            before, before + change, tokens, seed=seed, resamples=1000, groups=groups if with_groups else None
        )
        hits += not interval.excludes(-0.1)
    return hits / simulations


def test_covers_the_truth_as_often_as_it_says():
    # 200 draws at 95 %: standard error 1.5 %; the percentile bootstrap runs slightly short at n = 120.
    assert 0.90 <= covered(200, clustered=False, with_groups=False) <= 0.99


def test_covers_the_truth_with_clusters_only_when_told_of_them():
    assert 0.86 <= covered(200, clustered=True, with_groups=True) <= 0.99  # 20 groups: t(19) and 19/20 cost ≈ 3 %
    assert covered(200, clustered=True, with_groups=False) < 0.80


def test_clusters_widen_the_interval():
    random = np.random.default_rng(7)
    passage = np.repeat(random.normal(0.0, 1.0, size=15), 8)
    scores = passage + random.normal(0.0, 0.3, size=120)
    groups = [f"passage {row // 8}" for row in range(120)]
    naive, clustered = mean(scores), mean(scores, groups=groups)
    assert clustered.point == naive.point
    # Intra-class correlation 1 / 1.09 and 8 rows each: sqrt(1 + 7 · 0.92) = 2.7 in expectation.
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
    assert (naive.n, clustered.n) == (120, 15)


def test_groups_of_one_row_change_nothing():
    before, after, tokens = rows(8)
    groups = [f"row {row}" for row in range(len(tokens))]
    assert paired_nll(before, after, tokens, groups=groups) == paired_nll(before, after, tokens)


def test_groups_keep_each_row_its_weight():
    # One group of three rows and one of one: 3 / 4, not (1 + 0) / 2.
    assert mean([1, 1, 1, 0], groups=["a", "a", "a", "b"]).point == 0.75


def test_the_block_size_is_not_seen(monkeypatch):
    before, after, tokens = rows(9)
    whole = paired_nll(before, after, tokens, resamples=500)
    monkeypatch.setattr(compare, "BLOCK", 7 * len(tokens))
    assert paired_nll(before, after, tokens, resamples=500) == whole


def test_the_seed_is_all_the_chance_there_is():
    before, after, tokens = rows(10)
    assert paired_nll(before, after, tokens, seed=3) == paired_nll(before, after, tokens, seed=3)
    assert paired_nll(before, after, tokens, seed=3) != paired_nll(before, after, tokens, seed=4)


def test_a_higher_level_is_wider():
    before, after, tokens = rows(11)
    narrow, wide = (paired_nll(before, after, tokens, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.level == 0.99


@pytest.mark.parametrize(
    "interval",
    [
        paired_nll([2.0], [1.0], [4]),
        mean([0.5]),
        mean([0.0, 1.0], groups=["same", "same"]),
    ],
)
def test_one_unit_excludes_nothing(interval):
    assert (interval.low, interval.high, interval.n) == (-math.inf, math.inf, 1)
    assert not interval.excludes(1e300)


def test_the_ends_of_an_interval_belong_to_it():
    interval = Interval(0.5, 0.25, 0.75, n=3)
    assert interval.level == 0.95
    assert not interval.excludes(0.25)
    assert not interval.excludes(0.75)
    assert interval.excludes(0.0)
    assert interval.excludes(0.76)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0, 2.0], [1.0], [1, 1]), "'after': 1"),
        (([1.0], [1.0], [1, 1]), "'tokens': 2"),
        (([1.0, 2.0], [1.0, 2.0], [1, 0]), "0 in row 1"),
        (([1.0, 2.0], [1.0, 2.0], [-3, 1]), "-3 in row 0"),
        (([1.0, math.nan], [1.0, 2.0], [1, 1]), "`before` are not finite, first nan in row 1"),
        (([1.0, 2.0], [math.inf, 2.0], [1, 1]), "`after` are not finite, first inf in row 0"),
        (([], [], []), "no rows"),
        (([[1.0]], [[1.0]], [[1]]), "shape (1, 1)"),
        ((["x"], [1.0], [1]), "`before` is not a list of numbers"),
    ],
)
def test_unusable_rows_are_named(arguments, said):
    with pytest.raises(DataError) as caught:
        paired_nll(*arguments)
    assert said in str(caught.value)


def test_other_estimates_check_their_rows_too():
    for call in (
        lambda: mean([]),
        lambda: mean([math.nan]),
        lambda: paired_mean([1, 2], [1]),
        lambda: mean_nll([1.0], [0]),
        lambda: mean([1, 2], groups=["a"]),
    ):
        with pytest.raises(DataError):
            call()


def test_settings_out_of_range_are_all_reported():
    with pytest.raises(ConfigError) as caught:
        mean([1, 2], level=1.0, resamples=0)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    interval = wilson(successes, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert interval.point == successes / n


def test_wilson_speaks_where_the_bootstrap_is_silent():
    assert (mean([1] * 20).low, mean([1] * 20).high) == (1.0, 1.0)
    perfect = wilson(20, 20)
    assert (round(perfect.low, 4), perfect.high) == (0.8389, 1.0)  # the mirror of 0 of 20


@settings(deadline=None)
@given(n=st.integers(1, 5000), data=st.data(), level=st.floats(0.5, 0.999))
def test_wilson_agrees_with_scipy_and_holds_its_point(n, data, level):
    successes = data.draw(st.integers(0, n))
    ours = wilson(successes, n, level)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= ours.low <= ours.point <= ours.high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(DataError):
        wilson(successes, n)


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    seed=st.integers(0, 3),
)
def test_any_mean_lies_within_its_rows(scores, seed):
    interval = mean(scores, seed=seed, resamples=200)
    assert interval.n == len(scores)
    assert interval.low <= interval.high
    if interval.n > 1:
        # A resample's mean is a mean of rows, so it cannot leave their range but for rounding.
        assert min(scores) - 1e-12 <= interval.low
        assert interval.high <= max(scores) + 1e-12
