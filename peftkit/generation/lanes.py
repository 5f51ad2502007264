"""The rows of one model: reading prompts and generating, for all of them in one forward pass.

A lane belongs to one model: the bank with the rows of all its adapters and of the base, or one adapter's own model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from peftkit.generation.prefixes import WORTH_SHARING, common
from peftkit.generation.rows import Kept, Rows, keeps_rows, rounded
from peftkit.generation.running import Row
from peftkit.generation.seats import NO_SLOT, Computes


@dataclass(frozen=True)
class Scored:
    """Rows whose next token can be chosen."""

    rows: Sequence[Row] = ()
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """Shape (rows, vocabulary)."""


class Lane(Protocol):
    """What the engine asks of a lane."""

    rows: list[Row]
    passes: int
    """Forward passes so far."""
    virtual_tokens: int
    """How many positions an adapter takes before the prompt."""

    def join(self, row: Row, begun: tuple[Kept, int] | None) -> None:
        """Take a row in; `begun` are keys and values of its first tokens, and how many."""
        ...

    def leave(self, row: Row) -> None:
        """Let a row go."""
        ...

    def empty(self) -> list[Row]:
        """Let all rows go, without a look at their keys and values; they are returned, each once."""
        ...

    def read(self, budget: int) -> Scored:
        """Read prompts, together about `budget` tokens or one prompt as a whole; rows that have read theirs."""
        ...

    def decode(self) -> Scored:
        """Compute the next token of every row that is being answered."""
        ...

    def copy_of(self, row: Row) -> Kept | None:
        """Keys and values of what a row has read, where they can be shared."""
        ...

    def begun_alike(self, digest: str, prompt: Sequence[int]) -> int:
        """How much of the beginning of a prompt some row has read for the same digest, so that `join` can take it."""
        ...

    def places_with(self, tokens: int, *, shrunk: bool = False) -> int:
        """For how many tokens there is room once a row of so many has joined (0: none), or would be after `shrink`."""
        ...

    def shrink(self, tokens: int) -> None:
        """Give back what neither the rows need nor a row of so many tokens that joins them."""
        ...


def lane_for(computes: Computes, device: torch.device, pad_id: int, most: int) -> Lane:
    """A lane for `most` rows of a model: together where its layers keep plain keys and values, one by one where not."""
    with computes.seated([NO_SLOT], 1) as model:
        together = not getattr(model, "begins_with_virtual_tokens", False) and _takes_rows(model)
    return Together(computes, device, pad_id, most) if together else OneByOne(computes, device)


class Together:
    """Rows in one batch. Those that are being answered come first, so that a pass is over neighbours."""

    def __init__(self, computes: Computes, device: torch.device, pad_id: int, most: int) -> None:
        self.rows: list[Row] = []
        self.passes = self.virtual_tokens = 0
        self._computes, self._device, self._pad_id, self._most = computes, device, pad_id, most
        self._answering = 0
        with computes.seated([NO_SLOT], 1) as model:
            self._kept = Rows(model.config, device)
            self._additive = model.dtype if _attention(model) == "eager" else None
            self._keeps_last = "logits_to_keep" in _parameters(model)

    def join(self, row: Row, begun: tuple[Kept, int] | None) -> None:
        at = len(self.rows)
        self._kept.reserve(self._room_for(at + 1), len(row.tokens))
        alike, read = self._alike(row.seat.digest, row.tokens)
        if alike is not None and (begun is None or read >= begun[1]):
            self._kept.begin_like(self.rows.index(alike), at, read)
            row.read = read
        elif begun is not None:
            kept, row.read = begun
            self._kept.fill(at, kept, row.read)
        self.rows.append(row)  # last: a row that found no memory is none

    def leave(self, row: Row) -> None:
        at = self.rows.index(row)
        if at < self._answering:
            self._answering -= 1
            self._move(self._answering, at)
            at = self._answering
        for later in range(at + 1, len(self.rows)):  # in their order: the oldest prompt is read first
            self._move(later, later - 1)
        self.rows.pop()
        if self.rows:
            self._kept.wipe(len(self.rows))
        else:
            self._kept.release()

    def empty(self) -> list[Row]:
        rows, self.rows, self._answering = list(dict.fromkeys(self.rows)), [], 0
        self._kept.release()
        return rows

    def read(self, budget: int) -> Scored:
        waiting = self._with_something_to_read(self.rows[self._answering :])
        if not waiting:
            return Scored()
        chosen, longest = [waiting[0]], waiting[0].pending
        for row in waiting[1:]:
            longest = max(longest, row.pending)
            if longest * (len(chosen) + 1) > budget:
                break
            chosen.append(row)
        # Only a prompt that is read alone can be longer than the budget.
        logits = self._forward(self._answering, chosen, [min(row.pending, max(1, budget)) for row in chosen])
        through = [i for i, row in enumerate(chosen) if not row.pending]
        self._answering += len(through)
        return Scored([chosen[i] for i in through], logits[through])

    def decode(self) -> Scored:
        rows = self._with_something_to_read(self.rows[: self._answering])
        return Scored(rows, self._forward(0, rows, [1] * len(rows))) if rows else Scored()

    def copy_of(self, row: Row) -> Kept | None:
        return self._kept.copy_of(self.rows.index(row), row.read)

    def places_with(self, tokens: int, *, shrunk: bool = False) -> int:
        needed = self._needed(tokens)
        rows, length = (0, 0) if shrunk else self._kept.held
        return max(rows, needed[0]) * max(length, needed[1])

    def shrink(self, tokens: int) -> None:
        self._kept.shrink(*self._needed(tokens))

    def begun_alike(self, digest: str, prompt: Sequence[int]) -> int:
        return self._alike(digest, prompt)[1]

    def _alike(self, digest: str, prompt: Sequence[int]) -> tuple[Row | None, int]:
        """The row of this digest that has read most of the beginning of a prompt, and how much."""
        best, most = None, WORTH_SHARING - 1
        for row in self.rows:
            if row.seat.digest == digest and (shared := common(row.tokens[: row.read], prompt[:-1])) > most:
                best, most = row, shared
        return (best, most) if best is not None else (None, 0)

    def _needed(self, tokens: int) -> tuple[int, int]:
        """For how many rows, and of how many tokens, there must be room once a row of so many has joined; 0: none."""
        lengths = [row.most for row in self.rows] + [tokens] * (tokens > 0)
        return (self._room_for(len(lengths)), rounded(max(lengths))) if lengths else (0, 0)

    def _room_for(self, rows: int) -> int:
        """The next power of two: a cache that grew by every row would be copied for every row."""
        return max(rows, min(1 << (rows - 1).bit_length(), self._most))

    def _with_something_to_read(self, rows: list[Row]) -> list[Row]:
        """The rows; where an interruption came between a pass and the choice, the last token is read again."""
        for row in rows:
            row.read = min(row.read, len(row.tokens) - 1)
        return rows

    def _forward(self, first: int, rows: Sequence[Row], counts: list[int]) -> torch.Tensor:
        """Logits of shape (rows, vocabulary) after the next `counts` tokens of each row."""
        width = max(counts)
        window = self._kept.look(first, [row.read for row in rows], counts)
        ids = torch.full((len(rows), width), self._pad_id, dtype=torch.long)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            ids[i, width - count :] = torch.tensor(row.tokens[row.read : row.read + count])
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self._device),
            "attention_mask": self._kept.mask(self._additive),
            "position_ids": window.positions,
            "past_key_values": self._kept.cache,
            "use_cache": True,
        }
        if self._keeps_last:
            inputs["logits_to_keep"] = 1
        with self._computes.seated([row.seat.slot for row in rows], width) as model:
            logits: torch.Tensor = model(**inputs).logits[:, -1]
        self.passes += 1
        for row, count in zip(rows, counts, strict=True):
            row.read += count
        return logits

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._kept.move(source, target)
            self.rows[target] = self.rows[source]


class OneByOne:
    """Rows that are computed one after another, each with the cache that the model makes itself, if it hands one over.

    For layers whose state is not a row of keys and values, and for adapters that put virtual tokens before the input.
    """

    def __init__(self, computes: Computes, device: torch.device) -> None:
        self.rows: list[Row] = []
        self.passes = self.virtual_tokens = 0
        self._computes, self._device = computes, device
        self._caches: dict[int, Any] = {}
        with computes.seated([NO_SLOT], 1) as model:
            self.virtual_tokens = getattr(model, "virtual_tokens", 0)

    def join(self, row: Row, begun: tuple[Kept, int] | None) -> None:
        self.rows.append(row)

    def leave(self, row: Row) -> None:
        self.rows.remove(row)
        self._caches.pop(id(row), None)

    def empty(self) -> list[Row]:
        rows, self.rows = self.rows, []
        self._caches.clear()
        return rows

    def read(self, budget: int) -> Scored:
        row = next((row for row in self.rows if id(row) not in self._caches), None)
        return Scored() if row is None else Scored([row], self._forward(row)[None])

    def decode(self) -> Scored:
        rows = [row for row in self.rows if id(row) in self._caches]
        return Scored(rows, torch.stack([self._forward(row) for row in rows])) if rows else Scored()

    def copy_of(self, row: Row) -> Kept | None:
        return None

    def begun_alike(self, digest: str, prompt: Sequence[int]) -> int:
        return 0

    def places_with(self, tokens: int, *, shrunk: bool = False) -> int:
        return sum(row.most for row in self.rows) + tokens

    def shrink(self, tokens: int) -> None:
        pass  # a row's cache goes with it

    def _forward(self, row: Row) -> torch.Tensor:
        # Out of its place until the pass is through: an interrupted one spoils it. Without one, all is read again.
        cache = self._caches.pop(id(row), None) if row.pending else None
        ids = torch.tensor([row.tokens[row.read if cache is not None else 0 :]], device=self._device)
        with self._computes.seated([row.seat.slot], ids.shape[1]) as model:
            if cache is None:
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
            else:
                # Virtual tokens are in the cache by now: what follows them is the base's to compute.
                virtual = getattr(model, "begins_with_virtual_tokens", False)
                follows = model.get_base_model() if virtual else model
                out = follows(input_ids=ids, past_key_values=cache, use_cache=True)
        self.passes += 1
        self._caches[id(row)] = getattr(out, "past_key_values", None)
        row.read = len(row.tokens)
        logits: torch.Tensor = out.logits[0, -1]
        return logits


def _takes_rows(model: Any) -> bool:
    known = _parameters(model).keys()
    # An encoder that may be told to decode (RoBERTa) looks ahead, or counts its positions in a way of its own.
    encoder = hasattr(model.config, "is_decoder") and "encoder_hidden_states" in known
    # What counts keys from the end of the longest row (ALiBi, GPT-Neo's local layers) does so for every row.
    config = model.config.get_text_config()
    counted = getattr(config, "alibi", False) or "local" in getattr(config, "attention_layers", ())
    fits = {"position_ids", "past_key_values"} <= known and not encoder and not counted
    return fits and _attention(model) in ("sdpa", "eager") and keeps_rows(model.config)


def _attention(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", "eager"))


def _parameters(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters
