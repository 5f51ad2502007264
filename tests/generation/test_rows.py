"""Rows of keys and values against plain lists of them, and who looks at whom."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generation.engine_lab import CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from peftkit.generation.rows import Rows, rounded

COUNTS = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 9)), min_size=1, max_size=4)


def rows(config: Any = None) -> Rows:
    return Rows(config or LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2), CPU)


def write(held: Rows, first: int, starts: list[int], new: list[list[float]]) -> None:
    """One pass that writes `new[i]` to row first + i, in every layer; what fills the left is NaN."""
    held.look(first, starts, [len(row) for row in new])
    width = max(len(row) for row in new)
    filled = torch.tensor([[torch.nan] * (width - len(row)) + row for row in new])
    for number, layer in enumerate(held.cache.layers):
        states = (filled + number)[:, None, :, None].expand(-1, 1, -1, 4)
        layer.update(states, -states)


def content(held: Rows, row: int, length: int) -> list[float]:
    kept = held.copy_of(row, length)
    keys, values = kept[0]
    assert torch.equal(keys, -values)
    assert torch.equal(kept[1][0], keys + 1)
    return list(map(float, keys[0, :, 0]))


def sizes(held: Rows) -> set[tuple[int, int]]:
    """Rows and tokens that the storages have room for: one head of 4 numbers, in float32."""
    parts = [part for layer in held.cache.layers for part in (layer.keys, layer.values)]
    assert all(part.untyped_storage().nbytes() == part.shape[0] * part.shape[2] * 4 * 4 for part in parts)
    return {(part.shape[0], part.shape[2]) for part in parts}


@contextmanager
def scarce(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """While it lasts, there is no memory for the new tensor number `at`."""
    true, calls = torch.Tensor.new_zeros, [0]

    def planted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise MemoryError
        return true(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", planted)
        yield


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "move", "wipe", "reserve", "shrink"]), st.integers(0, 3), st.integers(0, 3)
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.integers(1, 40))
def test_rows_keep_what_was_written_through_every_move(steps: list[tuple[str, int, int]], size: int) -> None:
    held, wanted, value = rows(), [[0.0], [0.0], [0.0], [0.0]], 1.0
    write(held, 0, [0] * 4, wanted)
    for what, one, other in steps:
        if what == "write":
            first, last = sorted((one, other))
            new = []
            for row in range(first, last + 1):
                new.append([value + i for i in range(size if row == one else 1)])
                value += size
            write(held, first, [len(wanted[row]) for row in range(first, last + 1)], new)
            for row, more in zip(range(first, last + 1), new, strict=True):
                wanted[row] = wanted[row] + more
        elif what == "move" and one != other:
            held.move(one, other)
            wanted[other] = list(wanted[one])
        elif what == "wipe":
            held.wipe(one)
            wanted[one] = [0.0]
            assert float(held.cache.layers[0].keys[one].abs().sum()) == 0
            write(held, one, [0], [[0.0]])
        elif what == "reserve":
            held.reserve(4 + one, 64 * other)
        elif what == "shrink":
            had, longest = held.capacity, max(map(len, wanted))
            held.shrink(4 + one, longest)
            assert held.capacity == (min(had[0], 4 + one), rounded(longest)) == held.held
            assert sizes(held) == {held.capacity}
        assert [content(held, row, len(wanted[row])) for row in range(4)] == wanted
        assert held.capacity[1] == rounded(held.capacity[1]) >= max(map(len, wanted))


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 2), st.sampled_from([None, 4, 8]))
def test_every_token_looks_at_its_own_past_and_nothing_else(
    rows_of: list[tuple[int, int]], first: int, window: int | None
) -> None:
    plain = LlamaConfig(num_hidden_layers=2)
    config = plain if window is None else MistralConfig(num_hidden_layers=2, sliding_window=window)
    held = rows(config)
    starts, counts = [start for start, _ in rows_of], [count for _, count in rows_of]
    looked = held.look(first, starts, counts)
    mask, additive = held.mask(None), held.mask(torch.float32)
    assert mask.shape == (len(rows_of), 1, max(counts), looked.length)
    assert torch.equal(additive == 0, mask)
    assert float(additive.masked_select(~mask).max() if not mask.all() else -1) < 0
    for i, (start, count) in enumerate(rows_of):
        assert looked.positions[i, max(counts) - count :].tolist() == list(range(start, start + count))
        for j in range(count):
            at = start + j
            seen = mask[i, 0, max(counts) - count + j].nonzero()[:, 0].tolist()
            assert seen == list(range(0 if window is None else max(0, at - window + 1), at + 1))
        # What fills the left stands where the row's next token will: in the model's reach, and in the row's memory.
        assert set(looked.positions[i, : max(counts) - count].tolist()) <= {start + count}
    assert bool(mask.any(-1).all())


def test_layers_that_differ_have_a_mask_for_each_kind() -> None:
    held = rows(Gemma2Config(num_hidden_layers=4, sliding_window=3))
    held.look(0, [5], [1])
    masks = held.mask(None)
    assert masks["full_attention"][0, 0, 0].tolist() == [True] * 6
    assert masks["sliding_attention"][0, 0, 0].tolist() == [False] * 3 + [True] * 3


def test_memory_grows_by_reserving_and_is_given_back() -> None:
    held = rows()
    write(held, 0, [0], [[1.0, 2.0]])
    assert held.capacity == (1, 64)
    held.reserve(3, 65)
    assert held.capacity == (3, 128)
    assert held.cache.layers[1].keys.shape == (3, 1, 128, 4)
    assert content(held, 0, 2) == [1.0, 2.0]
    held.release()
    assert held.capacity == (0, 0)
    assert held.cache.layers[0].keys is None


def test_growing_that_was_interrupted_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    held = rows()
    write(held, 0, [0], [[1.0, 2.0]])
    with scarce(monkeypatch, at=2), pytest.raises(MemoryError):
        held.reserve(4, 100)
    assert held.capacity == (1, 64)
    assert held.held == (4, 128)
    write(held, 1, [0], [[5.0, 6.0, 7.0]])
    held.reserve(4, 100)
    assert content(held, 0, 2) == [1.0, 2.0]
    assert content(held, 1, 3) == [5.0, 6.0, 7.0]
    assert sizes(held) == {(4, 128)}


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_shrinking_that_was_interrupted_loses_nothing_and_is_done_again(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = rows()
    held.reserve(8, 200)
    write(held, 0, [0, 0], [[1.0, 2.0], [3.0]])
    with scarce(monkeypatch, at), pytest.raises(MemoryError):
        held.shrink(2, 100)
    assert held.held == (8, 256), "what has not been given back counts"
    write(held, 0, [2, 1], [[7.0], [8.0, 9.0]])
    held.shrink(2, 100)
    assert held.held == (2, 128)
    assert sizes(held) == {(2, 128)}
    assert content(held, 0, 3) == [1.0, 2.0, 7.0]
    assert content(held, 1, 3) == [3.0, 8.0, 9.0]


@pytest.mark.parametrize(("rows_then", "length"), [(2, 100), (16, 300), (8, 500), (3, 200)])
def test_changing_the_room_takes_one_tensor_more_for_a_moment(
    rows_then: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by what is alive: there is never a second block, however many layers there are."""
    held = rows(LlamaConfig(num_hidden_layers=8, hidden_size=8, num_attention_heads=2))
    held.reserve(8, 200)
    write(held, 0, [0], [[1.0]])
    tensors = [weakref.ref(part) for layer in held.cache.layers for part in (layer.keys, layer.values)]
    true, most = torch.Tensor.new_zeros, [0]

    def alive() -> int:
        return sum(tensor.nbytes for each in tensors if (tensor := each()) is not None)

    def counted(*args: Any, **kwargs: Any) -> Any:
        made = true(*args, **kwargs)
        tensors.append(weakref.ref(made))
        most[0] = max(most[0], alive())
        return made

    before = alive()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", counted)
        if rows_then < 8:
            held.shrink(rows_then, length)
        else:
            held.reserve(rows_then, length)
    after = alive()
    assert before != after
    assert max(before, after) < most[0] <= max(before, after) + min(before, after) // 16


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_rows_go_on_growing_after_shrinking_that_was_interrupted(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = rows()
    held.reserve(8, 200)
    write(held, 0, [0, 0], [[1.0, 2.0], [3.0]])
    with scarce(monkeypatch, at), pytest.raises(MemoryError):
        held.shrink(2, 100)
    long = [float(i) for i in range(150)]
    write(held, 1, [1, 0], [[4.0], long])
    assert held.held == (3, 192)
    assert sizes(held) == {(3, 192)}
    assert content(held, 0, 2) == [1.0, 2.0]
    assert content(held, 1, 2) == [3.0, 4.0]
    assert content(held, 2, 150) == long
