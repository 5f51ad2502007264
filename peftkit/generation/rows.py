"""Keys and values of rows that join and leave between steps: row i holds its tokens from position 0 on.

A row begins at the left, so a token's place in the cache is its position in the text and attention is plainly causal;
what lies beyond a row's end is never looked at and is written over later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

Kept = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer, each of shape (heads, tokens, dim)."""

_ROUND = 64
"""Capacities are multiples of this many tokens, so that a growing row is copied rarely."""


@dataclass(frozen=True)
class Window:
    """The rows and positions of one forward pass."""

    first: int
    last: int
    rows: torch.Tensor
    """int64 of shape (rows, 1): which rows they are."""
    positions: torch.Tensor
    """int64 of shape (rows, tokens): where each given token stands in its row."""
    length: int
    """How far any row is looked at."""


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, of shape (rows, heads, length, dim); `Rows` says what a pass reads and writes."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Room for the rows, in the shapes and dtypes that the model gives."""
        rows, length = self.rows.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], length, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], length, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write the new tokens where they belong, and return all that the rows of this pass may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.rows.window
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[window.rows, :, window.positions] = new.transpose(1, 2)
        seen = slice(window.first, window.last)
        return self.keys[seen, :, : window.length], self.values[seen, :, : window.length]

    def get_seq_length(self) -> int:
        """Not asked for: positions are given."""
        return self.rows.window.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: the mask is given."""
        return self.rows.window.length, 0

    def get_max_length(self) -> int:
        """No limit: rows grow."""
        return -1


class Rows:
    """The rows of one model; `cache` is what the model is called with."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self.device = device
        self.capacity = 0, 0
        nothing = torch.empty(0, 0, dtype=torch.long)
        self.window = Window(0, 0, nothing, nothing, 0)
        made = DynamicCache(config=config).layers
        self.windows = [getattr(layer, "sliding_window", None) for layer in made]
        self._layers = [RowLayer(self) for _ in made]
        self.cache = Cache(layers=self._layers)
        self._kinds: list[str] | None = getattr(config.get_text_config(), "layer_types", None)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for so many rows of so many tokens; what is there stays."""
        wanted = max(rows, self.capacity[0]), max(rounded(length), self.capacity[1])
        if wanted == self.capacity:
            return
        self._resize(*wanted)
        self.capacity = wanted  # only now: where there was no memory for all of them, the next call goes on

    def shrink(self, rows: int, length: int) -> None:
        """Give back what is more than room for so many rows of so many tokens; what is within stays."""
        self.capacity = min(rows, self.capacity[0]), min(rounded(length), self.capacity[1])
        self._resize(*self.capacity)  # only now: where it is interrupted, some layers have more, and none has less

    @property
    def held(self) -> tuple[int, int]:
        """The most rows, and the most tokens of a row, that any layer has room for: the capacity, or what is left of a
        change that was interrupted."""
        shapes = [part.shape for layer in self._filled() for part in (layer.keys, layer.values)]
        rows, length = self.capacity
        return max([rows, *(shape[0] for shape in shapes)]), max([length, *(shape[2] for shape in shapes)])

    def release(self) -> None:
        """Give all memory back."""
        self.capacity = 0, 0
        for layer in self._layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one, of which nothing is left."""
        for layer in self._filled():
            for held in (layer.keys, layer.values):
                held[target] = held[source]

    def wipe(self, row: int) -> None:
        """Forget a row. What is no number must not stay: whoever comes next gives it no weight, and 0 · NaN is NaN."""
        for layer in self._filled():
            for held in (layer.keys, layer.values):
                held[row] = 0

    def copy_of(self, row: int, length: int) -> Kept:
        """The first tokens of a row."""
        return [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in self._layers]

    def begin_like(self, source: int, target: int, length: int) -> None:
        """Begin a row with the first `length` tokens of another."""
        for layer in self._filled():
            for held in (layer.keys, layer.values):
                held[target, :, :length] = held[source, :, :length]

    def fill(self, row: int, kept: Kept, length: int) -> None:
        """Begin a row with the first `length` tokens of what was kept."""
        for layer, (keys, values) in zip(self._layers, kept, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[row, :, :length] = keys[:, :length]
            layer.values[row, :, :length] = values[:, :length]

    def look(self, first: int, starts: Sequence[int], counts: Sequence[int]) -> Window:
        """Set what the next pass reads and writes: `counts[i]` new tokens of row `first + i`, from `starts[i]` on.

        The tokens of a row stand at the right end of the batch. What fills the left is given the position after them,
        which no token of the row looks at, and which the model has, since a token will stand there.
        """
        width = max(counts)
        rows = []
        for start, count in zip(starts, counts, strict=True):
            rows.append([start + count] * (width - count) + [*range(start, start + count)])
        positions = torch.tensor(rows, dtype=torch.long, device=self.device)
        length = max(max(row) for row in rows) + 1
        self.reserve(first + len(rows), length)
        these = torch.arange(first, first + len(rows), device=self.device)[:, None]
        self.window = Window(first, first + len(rows), these, positions, length)
        return self.window

    def mask(self, additive: torch.dtype | None) -> Any:
        """Who looks at whom in this pass: bool of shape (rows, 1, tokens, length), or numbers to add to the scores.

        For a model whose layers differ, one mask for each kind of layer, as transformers names them.
        """
        if len(set(self.windows)) == 1:
            return self._masked(self.windows[0], additive)
        assert self._kinds is not None
        kinds = dict(zip(self._kinds, self.windows, strict=False))
        return {kind: self._masked(window, additive) for kind, window in kinds.items()}

    def _masked(self, window: int | None, additive: torch.dtype | None) -> torch.Tensor:
        at = self.window.positions[:, None, :, None]
        keys = torch.arange(self.window.length, device=self.device)
        seen = keys <= at
        if window is not None:
            seen &= keys > at - window
        if additive is None:
            return seen
        return torch.zeros(seen.shape, dtype=additive, device=self.device).masked_fill_(
            ~seen, torch.finfo(additive).min
        )

    def _resize(self, rows: int, length: int) -> None:
        """Copy what lies within into tensors of this room, one after another: only one is there twice at a time."""
        for layer in self._filled():
            for name in ("keys", "values"):
                held = getattr(layer, name)
                had, heads, most, dim = held.shape
                if (had, most) == (rows, length):
                    continue
                made = held.new_zeros(rows, heads, length, dim)
                both = slice(min(rows, had)), slice(None), slice(min(length, most))
                made[both] = held[both]
                setattr(layer, name, made)

    def _filled(self) -> list[RowLayer]:
        return [layer for layer in self._layers if layer.is_initialized]


def rounded(tokens: int) -> int:
    """For how many tokens there is room in a row of so many."""
    return -(-tokens // _ROUND) * _ROUND


def bytes_per_token(model: Any, device: torch.device) -> int:
    """Memory of one token's keys and values, found by running one token."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache = getattr(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    parts = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(part[:, :, -1:].nbytes for part in parts if isinstance(part, torch.Tensor))


def keeps_rows(config: Any) -> bool:
    """Whether every layer of a model keeps plain keys and values, with or without a sliding window.

    Layers with a state of another kind (linear attention, convolutions, chunks) cannot hold rows of different length,
    and rotations that change with the longest row of a batch would let one row change the others.
    """
    if getattr(config, "is_encoder_decoder", False) or _rotations(config) & {"dynamic", "longrope"}:
        return False
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    plain = all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    )
    return plain and set(kinds) <= {"full_attention", "sliding_attention"}


def _rotations(config: Any) -> set[Any]:
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return {part.get("rope_type") for part in (given, *given.values()) if isinstance(part, dict)}
