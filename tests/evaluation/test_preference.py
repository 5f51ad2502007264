"""What is said of base and adapter on preferences, against values worked out by hand and scikit-free references."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from peftkit.data.chat import IGNORED, Example
from peftkit.data.preference.example import PreferenceExample
from peftkit.errors import DataError
from peftkit.evaluation.compare import wilson
from peftkit.evaluation.preference import PreferenceComparison, PreferenceMeasured, held_out_answers


def answer(tokens: int, line: int) -> Example:
    return Example([1, *[5] * tokens], [IGNORED, *[5] * tokens], 1, line - 1, f"made.jsonl:{line}")


def measured(name: str, better: list[float], worse: list[float]) -> PreferenceMeasured:
    return PreferenceMeasured(name, np.array(better), np.array(worse), [])


@pytest.fixture
def pairs() -> PreferenceComparison:
    """Four pairs; the rewards are (1, -1), (2, 3), (-4, -6), (0, 0): right, wrong, right, a tie that is not right."""
    better = tuple(answer(tokens, line) for line, tokens in enumerate((2, 4, 8, 2), start=1))
    worse = tuple(answer(tokens, line) for line, tokens in enumerate((4, 6, 2, 2), start=1))
    base = measured("base", [-10, -20, -30, -5], [-9, -19, -40, -4])
    adapter = measured("adapter", [-9, -18, -34, -5], [-10, -16, -46, -4])
    return PreferenceComparison(better, worse, True, None, base, adapter)


def test_pairs_by_hand(pairs: PreferenceComparison) -> None:
    figures = pairs.figures()
    expected = wilson(2, 4)
    assert pairs.accuracy == expected
    assert figures["after"]["preference_accuracy"] == {
        "point": 0.5, "low": pytest.approx(expected.low), "high": pytest.approx(expected.high)
    }  # fmt: skip
    # Per token: 0.5 > -0.25, 0.5 > 0.5 is not so, -0.5 > -3, 0 > 0 is not so.
    assert figures["after"]["preference_accuracy_per_token"]["point"] == 0.5
    assert figures["after"]["margin"]["point"] == pytest.approx((2 - 1 + 2 + 0) / 4)
    assert figures["after"]["reward_better"]["point"] == pytest.approx(-0.25)
    assert figures["after"]["reward_worse"]["point"] == pytest.approx(-1.0)
    # The base: -10 > -9 no, -20 > -19 no, -30 > -40 yes, -5 > -4 no; per token -5 no, -5 no, -3.75 yes, -2.5 no.
    assert figures["before"]["likelihood_accuracy"]["point"] == 0.25
    assert figures["after"]["likelihood_accuracy"]["point"] == 0.5
    assert figures["before"]["likelihood_accuracy_per_token"]["point"] == 0.25
    assert "preference_accuracy" not in figures["before"]  # the base against itself prefers nothing
    assert figures["other"]["likelihood_accuracy_change"]["point"] == pytest.approx(0.25)
    assert figures["before"]["answer_nll"]["point"] == pytest.approx(65 / 16)
    assert figures["other"]["answer_nll_change"]["point"] == pytest.approx(1 / 16)
    assert figures["other"]["measured"] == {"pairs": 4}
    assert pairs.objective() == ("preference_accuracy", 0.5, "max")


def test_the_table_and_the_samples(pairs: PreferenceComparison) -> None:
    base, adapter = pairs.rows()
    assert len(base) == len(adapter) == len(pairs.COLUMNS)
    assert base[:5] == ("base", "", "", "", "25%")
    assert adapter[:2] == ("adapter", "50%")
    assert adapter[5] == "+0.75"
    assert pairs.samples()[0] == {"where": "made.jsonl:1", "chosen": 1.0, "rejected": -1.0, "margin": 2.0}


def test_labelled_rows_are_ranked_over_all_couples() -> None:
    rng = np.random.default_rng(0)
    wanted, unwanted = rng.normal(2, 1, 30).round(1), rng.normal(0, 1, 20).round(1)
    rows = tuple(answer(3, line) for line in range(1, 51))
    comparison = PreferenceComparison(
        rows[:30], rows[30:], False, None, measured("base", [0.0] * 30, [0.0] * 20),
        measured("adapter", wanted.tolist(), unwanted.tolist()),
    )  # fmt: skip
    couples = list(product(wanted, unwanted))
    assert sum(a == b for a, b in couples) > 0  # ties are there, and count half
    expected = sum((a > b) + 0.5 * (a == b) for a, b in couples) / len(couples)
    assert comparison.accuracy.point == pytest.approx(expected)
    assert comparison.accuracy.low < expected < comparison.accuracy.high
    assert comparison.accuracy.low > 0.5  # two standard deviations apart
    assert comparison.margin.point == pytest.approx(wanted.mean() - unwanted.mean())
    figures: dict[str, Any] = comparison.figures()
    assert figures["other"]["measured"] == {"wanted": 30, "unwanted": 20}
    assert "likelihood_accuracy" not in figures["before"]  # likelihoods of answers to other prompts say nothing
    assert [row["desirable"] for row in comparison.samples()] == [True] * 30 + [False] * 20


def test_unpaired_pairs_are_measured_as_pairs() -> None:
    first, second, third = answer(2, 1), answer(3, 1), answer(4, 2)
    labelled = [PreferenceExample(second, desirable=False), PreferenceExample(first, desirable=True)]
    assert held_out_answers(labelled) == ((first,), (second,), True)
    assert held_out_answers([PreferenceExample(first, second)]) == ((first,), (second,), True)
    apart = [PreferenceExample(first, desirable=True), PreferenceExample(third, desirable=False)]
    assert held_out_answers(apart) == ((first,), (third,), False)
    with pytest.raises(DataError, match="the same label"):
        held_out_answers(apart[:1])
