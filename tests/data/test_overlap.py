"""Shares of n-grams, against counts made by hand and against a naive reading of the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data.overlap import ngram_overlap
from peftkit.errors import ConfigError, DataError

words = st.lists(st.sampled_from("abc"), max_size=8).map(" ".join)


def test_shares_counted_by_hand() -> None:
    held = ["one two three four", "five six seven eight", "one two three nine"]
    found = ngram_overlap(held, ["zero one two three, four!", "six"], n=3)
    assert found.highest == 1.0
    assert found.highest_index == 0
    assert found.mean == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert found.rows_sharing == 2
    assert found.exact_duplicates == 0


def test_a_short_text_is_shared_only_with_its_equal() -> None:
    assert ngram_overlap(["Yes."], ["he said yes to all of it and more"], n=8).highest == 0.0
    assert ngram_overlap(["Yes."], ["yes"], n=8).highest == 1.0
    assert ngram_overlap(["yes please"], ["yes no", "please"], n=8).highest == 0.0


def test_exact_duplicates_are_counted_by_character() -> None:
    found = ngram_overlap(["same text", "same text", "Same text", "", "other"], ["same text", ""], n=2)
    assert found.exact_duplicates == 3
    assert found.rows_sharing == 3  # case and punctuation do not matter for n-grams; a text without words shares none


def test_a_character_is_a_word_in_chinese_and_japanese() -> None:
    found = ngram_overlap(["识别并解释abc理论"], ["请识别并解释它"], n=4)
    assert found.highest == pytest.approx(2 / 5)  # of 识别并解 别并解释 并解释abc 解释abc理 释abc理论


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.lists(words, max_size=5), st.integers(1, 4))
def test_equals_the_naive_definition(held: list[str], train: list[str], n: int) -> None:
    def grams(text: str) -> list[str]:
        parts = text.split()
        return [" ".join(parts[at : at + n]) for at in range(max(1, len(parts) - n + 1))] if parts else []

    everywhere = {gram for text in train for gram in grams(text)}
    shares = [sum(gram in everywhere for gram in grams(text)) / max(1, len(grams(text))) for text in held]
    found = ngram_overlap(held, train, n)
    assert found.highest == max(shares)
    assert shares[found.highest_index] == max(shares)
    assert found.mean == pytest.approx(sum(shares) / len(shares))
    assert found.rows_sharing == sum(share > 0 for share in shares)


@settings(deadline=None)
@given(st.lists(words.filter(bool), min_size=1, max_size=5), st.integers(1, 4))
def test_texts_against_themselves_share_everything(held: list[str], n: int) -> None:
    found = ngram_overlap(held, held, n)
    assert (found.highest, found.mean, found.exact_duplicates) == (1.0, 1.0, len(held))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="less than 1"):
        ngram_overlap(["a"], ["a"], n=0)
    with pytest.raises(DataError, match="no held-out texts"):
        ngram_overlap([], ["a"])
