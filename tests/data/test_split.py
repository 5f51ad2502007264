"""Both sides of a split are disjoint by content and the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peftkit.data.split import split
from peftkit.errors import ConfigError, DataError

rows_lists = st.lists(st.text(max_size=3), min_size=2).filter(lambda rows: len(set(rows)) > 1)


def same(row: str) -> str:
    return row


@settings(deadline=None)
@given(rows_lists, st.data(), st.integers())
def test_no_row_is_lost_and_no_content_stands_on_both_sides(rows: list[str], data: Any, seed: int) -> None:
    wanted = data.draw(st.integers(1, len(rows) - 1))
    parts = split(rows, wanted, seed, same)
    assert Counter(parts.train) + Counter(parts.held_out) == Counter(rows)
    assert parts.train
    assert parts.held_out
    assert not set(parts.train) & set(parts.held_out)
    assert list(parts.train) == [row for row in rows if row in set(parts.train)]  # in the order given


@settings(deadline=None)
@given(rows_lists, st.data(), st.integers())
def test_the_order_of_the_rows_does_not_matter(rows: list[str], data: Any, seed: int) -> None:
    wanted = data.draw(st.integers(1, len(rows) - 1))
    mixed = data.draw(st.permutations(rows))
    assert set(split(rows, wanted, seed, same).held_out) == set(split(mixed, wanted, seed, same).held_out)


@settings(deadline=None)
@given(st.sets(st.text(), min_size=2), st.data(), st.integers())
def test_distinct_rows_are_held_out_in_exactly_the_number_asked_for(rows: set[str], data: Any, seed: int) -> None:
    wanted = data.draw(st.integers(1, len(rows) - 1))
    assert len(split(sorted(rows), wanted, seed, same).held_out) == wanted


@settings(deadline=None)
@given(rows_lists, st.data())
def test_whole_groups_come_no_further_from_the_number_than_the_largest_of_them(rows: list[str], data: Any) -> None:
    wanted = data.draw(st.integers(1, len(rows) - 1))
    off = abs(len(split(rows, wanted, 0, same).held_out) - wanted)
    assert off < max(Counter(rows).values())


def test_a_group_is_passed_over_or_taken_whichever_is_nearer() -> None:
    assert len(split(["a"] * 5 + ["b"] * 4, 3, 0, same).held_out) == 4  # none fits: the smallest, not nothing
    assert len(split(["a"] * 50 + list("bcdef"), 5, 0, same).held_out) == 5
    assert len(split(["a"] * 9 + ["b"] * 8 + ["c"] * 2, 7, 0, same).held_out) == 8  # 8 is nearer to 7 than 2


def test_a_share_is_rounded_to_rows_and_the_seed_matters() -> None:
    rows = [str(number) for number in range(1000)]
    assert len(split(rows, 0.05, 1, same).held_out) == 50
    assert split(rows, 0.05, 1, same) == split(rows, 50, 1, same)
    assert split(rows, 0.05, 1, same).held_out != split(rows, 0.05, 2, same).held_out


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_the_result_is_fixed_for_all_machines_and_processes(hash_seed: str) -> None:
    code = (
        "from peftkit.data.split import split\n"
        "print(*split([f'row {n}' for n in range(40)], 0.15, 7, lambda row: row).held_out, sep=',')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, timeout=60
    )
    # the six lowest of `printf '7\\0row N' | sha256sum`: another order would move rows of every user's split
    assert done.stdout == "row 11,row 13,row 22,row 26,row 35,row 38\n", done.stderr


@settings(deadline=None)
@given(st.sets(st.text(), min_size=40, max_size=60), st.text(min_size=1), st.integers())
def test_one_more_row_moves_at_most_one_other(rows: set[str], more: str, seed: int) -> None:
    assume(more not in rows)
    before = set(split(sorted(rows), 10, seed, same).held_out)
    after = set(split(sorted(rows | {more}), 10, seed, same).held_out)
    assert len(before - after) <= 1


def test_keys_with_half_a_surrogate_pair_are_hashed_like_others() -> None:
    assert len(split(["\ud800", "\udc00", "a"], 1, 0, same).held_out) == 1


@pytest.mark.parametrize("held_out", [True, 1.0, 0.0, -0.1, 1.5, -1, float("nan"), "0.1"])
def test_a_size_that_is_no_size_is_a_config_error(held_out: Any) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        split(["a", "b"], held_out, 0, same)


@pytest.mark.parametrize(
    ("rows", "held_out", "said"),
    [
        (["a", "b"], 0, "the held-out side would be empty"),
        (["a", "b"], 2, "the training side would be empty"),
        (["a", "b"], 3, "the training side would be empty"),
        (["a"] * 100, 0.001, "the held-out side would be empty"),
        (["a"] * 100, 10, "1 distinct content"),
        ([], 0.5, "0 rows"),
    ],
)
def test_an_empty_side_is_refused(rows: list[str], held_out: float | int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        split(rows, held_out, 0, same)
