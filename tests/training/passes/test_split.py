"""Micro-batches: every row once, never more tokens than allowed, few of them, and the lengths alone decide."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.passes.lab import turns

from peftkit.planning.tokens import CPU_TOKENS
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import lengths, split, tokens_of
from peftkit.training.spec import TrainSpec

LENGTHS = st.lists(st.integers(1, 60), min_size=0, max_size=24)


def cost(rows: list[int], batch: list[int], flat: bool) -> int:
    """Tokens that go through the model, padding included."""
    sizes = [rows[index] for index in batch]
    return sum(sizes) if flat else len(sizes) * max(sizes)


@given(LENGTHS, st.integers(1, 120), st.booleans())
def test_every_row_once_and_never_more_tokens_than_allowed(rows: list[int], tokens: int, flat: bool) -> None:
    batches = split(rows, tokens, flat=flat)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    assert all(batches)
    assert all(cost(rows, batch, flat) <= tokens or len(batch) == 1 for batch in batches)


@given(LENGTHS, st.integers(1, 120), st.booleans(), st.randoms())
def test_the_order_of_rows_changes_no_micro_batch(rows: list[int], tokens: int, flat: bool, draw: object) -> None:
    shuffled = list(rows)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    found, again = (
        [[some[index] for index in batch] for batch in split(some, tokens, flat=flat)] for some in (rows, shuffled)
    )
    assert found == again
    assert split(rows, tokens, flat=flat) == split(rows, tokens, flat=flat)


@given(LENGTHS, st.integers(1, 120))
def test_padded_rows_have_neighbours_of_their_length(rows: list[int], tokens: int) -> None:
    batches = split(rows, tokens, flat=False)
    laid = [rows[index] for batch in batches for index in batch]
    assert laid == sorted(rows)
    for batch, following in pairwise(batches):
        assert cost(rows, [*batch, following[0]], flat=False) > tokens, "the next row would have fitted"


def fewest(rows: tuple[int, ...], tokens: int) -> int:
    """Micro-batches of the best division, by trying all of them."""

    @cache
    def best(left: tuple[int, ...], room: tuple[int, ...]) -> int:
        if not left:
            return len(room)
        row, rest = left[0], left[1:]
        found = best(rest, tuple(sorted((*room, max(0, tokens - row)))))
        for at, free in enumerate(room):
            if row <= free:
                found = min(found, best(rest, tuple(sorted((*room[:at], free - row, *room[at + 1 :])))))
        return found

    return best(tuple(sorted(rows, reverse=True)), ())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(10, 40))
def test_flat_rows_take_nearly_the_fewest_passes_possible(rows: list[int], tokens: int) -> None:
    assert len(split(rows, tokens, flat=True)) <= 11 / 9 * fewest(tuple(rows), tokens) + 1


def test_the_search_for_the_fewest_is_right() -> None:
    assert fewest((6, 5, 5, 4, 4, 3, 3), 10) == 3
    assert fewest((9, 9, 9), 10) == 3
    assert fewest((50, 1), 10) == 2


def test_flat_rows_waste_less_than_padded_ones() -> None:
    rows = [60, 3, 5, 58, 4, 2]
    flat, padded = split(rows, 66, flat=True), split(rows, 66, flat=False)
    assert flat == [[0, 2], [3, 4, 1], [5]] or len(flat) <= 3
    assert sum(cost(rows, batch, True) for batch in flat) == sum(rows)
    assert sum(cost(rows, batch, False) for batch in padded) > sum(rows)


@given(LENGTHS, st.integers(1, 60), st.integers(1, 120))
def test_rows_beyond_a_window_are_padded(rows: list[int], longest: int, tokens: int) -> None:
    batches = Paths(flat=True, longest=longest).micro_batches(rows, tokens)
    assert sorted(index for batch, _ in batches for index in batch) == list(range(len(rows)))
    for batch, flat in batches:
        assert {rows[index] <= longest for index in batch} == {flat}
        assert cost(rows, batch, flat) <= tokens or len(batch) == 1


def test_without_a_limit_all_rows_lie_flat_and_by_default_none_does() -> None:
    assert {flat for _, flat in Paths(flat=True).micro_batches([3, 500, 9], 100)} == {True}
    assert {flat for _, flat in Paths().micro_batches([3, 500, 9], 100)} == {False}


@pytest.mark.parametrize(
    ("device", "longest", "wanted"),
    [("cpu", 10, 40), ("cpu", 400, CPU_TOKENS), ("cpu", 5000, 5000), ("cuda", 400, 1600), ("cuda", 10, 40)],
)
def test_the_tokens_of_a_run(device: str, longest: int, wanted: int) -> None:
    """Four rows of the longest, on a CPU not more than CPU_TOKENS, and a long row goes through whole."""
    rows = turns((3, longest, 7))
    assert lengths(rows) == [3, longest, 7]
    spec = TrainSpec(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert tokens_of(rows, spec, torch.device(device)) == wanted
