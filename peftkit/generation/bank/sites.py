"""The layers of a model that a bank can add to: each in place of a linear layer, those with one input together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.generation.bank.layout import Layout, product


class Seating:
    """Which slots the tokens of the running batch belong to; shared by all sites of a bank."""

    def __init__(self) -> None:
        self.layouts: Mapping[int, Layout] = {}
        """By how many tokens a layer is given: all of them, or the last one of each row, as a head is."""


class Site(nn.Module):  # type: ignore[misc]
    """A linear layer with the deltas of many adapters beside it."""

    def __init__(self, layer: nn.Module, group: Group, index: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        object.__setattr__(self, "group", group)  # a group is no part of the tree: its tensors are the bank's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (…, in) → (…, out): the base's, plus what each token's adapter adds."""
        out: torch.Tensor = self.layer(x)
        self.group.add(self.index, x, out)
        return out

    @property
    def weight(self) -> Any:
        """The base's weight: some models look at it."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.layer.bias


class Group:
    """Sites that are given the same input, such as q, k and v: their first factors are one matrix.

    `a` has the shape (slots, Σ ranks, in), `b` one tensor (slots, rank, out) for each site, scaling included. A rank of
    0 means that no adapter has changed that site so far.
    """

    def __init__(self, names: list[str], widths: list[int], inputs: int, seating: Seating) -> None:
        self.names, self.widths, self.inputs, self.seating = names, widths, inputs, seating
        self.ranks = [0] * len(names)
        self.slots = 0
        self.a: torch.Tensor | None = None
        self.b: list[torch.Tensor | None] = [None] * len(names)
        self._seen: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        self._waiting: set[int] = set()
        self._spans = _spans(self.ranks)
        self._laid_for: Layout | None = None
        self._laid: dict[int, torch.Tensor] = {}

    def bytes_for(self, slots: int, ranks: list[int], item: int) -> int:
        """Bytes of the factors for so many slots and these ranks."""
        return slots * sum(rank * (self.inputs + width) for rank, width in zip(ranks, self.widths, strict=True)) * item

    def put(self, slot: int, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Fill a slot: name → (A of shape (r, in), B · scaling of shape (out, r)); sites without factors add nothing.

        Rows beyond an adapter's own rank are zeroed: another one may have stood there.
        """
        if self.a is None:
            return
        for i, (first, last) in enumerate(self._spans):
            b = self.b[i]
            if b is None:
                continue
            self.a[slot, first:last] = 0
            b[slot] = 0
            if self.names[i] in factors:
                right, left = factors[self.names[i]]
                rank = right.shape[0]
                self.a[slot, first : first + rank] = right.to(self.a)
                b[slot, :rank] = left.T.to(b)

    def add(self, index: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add what the tokens' adapters say about one site to its output, in place."""
        b = self.b[index]
        if not self.seating.layouts or b is None:
            return
        layout = self.seating.layouts[x.numel() // self.inputs]
        first, last = self._spans[index]
        hidden, taken = self._shared(index, x, layout)[..., first:last], self._taken(b, layout)
        flat = out.view(-1, out.shape[-1])
        if flat.dtype == b.dtype:
            layout.add(flat, hidden, taken)
            return
        exact = flat.to(b.dtype)
        layout.add(exact, hidden, taken)
        flat.copy_(exact)

    def forget(self) -> None:
        """Let go of the input of the last forward pass."""
        self._seen = self._hidden = None
        self._waiting = set()

    def _taken(self, stack: torch.Tensor, layout: Layout) -> torch.Tensor:
        """What a layout's groups take of a stack. Views are kept while the layout is: there are a thousand in a pass;
        copies are not, since they would be memory that nobody counts."""
        if not isinstance(layout.slots, slice):
            return stack[layout.slots]
        if self._laid_for is not layout:
            self._laid_for, self._laid = layout, {}
        if id(stack) not in self._laid:
            self._laid[id(stack)] = stack[layout.slots]
        return self._laid[id(stack)]

    def _shared(self, index: int, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """x times the first factors of all sites, computed when the first of them is called with this input."""
        if self._seen is x and index in self._waiting and self._hidden is not None:
            self._waiting.discard(index)
            hidden = self._hidden
            if not self._waiting:
                self.forget()
            return hidden
        assert self.a is not None
        tokens = layout.gathered(x.reshape(-1, self.inputs).to(self.a.dtype))
        hidden = product(tokens, self._taken(self.a, layout).transpose(1, 2))
        waiting = {i for i, rank in enumerate(self.ranks) if rank and i != index}
        if waiting:
            self._seen, self._hidden, self._waiting = x, hidden, waiting
        return hidden

    def ranks_of(self, ranks: Mapping[str, int]) -> list[int]:
        """The rank of each site, from path → rank."""
        return [ranks.get(name, 0) for name in self.names]

    def resize(self, slots: int, ranks: list[int], dtype: torch.dtype, device: torch.device) -> None:
        """Give the stacks so many slots and these ranks; what lies beyond is lost. When it raises, nothing changed."""
        if (slots, ranks) == (self.slots, self.ranks):
            return
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        new = Group(self.names, self.widths, self.inputs, self.seating)
        new.slots, new.ranks, new._spans = slots, ranks, _spans(ranks)
        new.a = torch.zeros(slots, sum(ranks), self.inputs, **options) if any(ranks) and slots else None
        if new.a is not None:
            pairs = zip(ranks, self.widths, strict=True)
            new.b = [torch.zeros(slots, rank, width, **options) if rank else None for rank, width in pairs]
            new._fill_from(self)
        self.__dict__.update(vars(new))  # in one step: neither an interrupt nor a lack of memory comes between

    def _fill_from(self, old: Group) -> None:
        """Copy what both have room for."""
        if self.a is None or old.a is None:
            return
        slots = min(self.slots, old.a.shape[0])
        for i, ((first, last), (start, end)) in enumerate(zip(self._spans, old._spans, strict=True)):
            b, before = self.b[i], old.b[i]
            if b is not None and before is not None:
                rank = min(last - first, end - start)
                self.a[:slots, first : first + rank] = old.a[:slots, start : start + rank]
                b[:slots, :rank] = before[:slots, :rank]

    def take(self, slot: int, ranks: Mapping[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A copy on the CPU of what was put into a slot, by name; `ranks` are its own."""
        found = {}
        for name, b, (first, _) in zip(self.names, self.b, self._spans, strict=True):
            rank = ranks.get(name, 0)
            if self.a is not None and b is not None and rank:
                right, left = self.a[slot, first : first + rank], b[slot, :rank]
                found[name] = right.to("cpu", copy=True), left.to("cpu", copy=True).T
        return found

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for stack in (self.a, *self.b):
            if stack is not None:
                stack[target] = stack[source]


def _spans(ranks: list[int]) -> list[tuple[int, int]]:
    """Where the first factors of each site stand among those of its group."""
    ends = list(accumulate(ranks))
    return [(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its path, quantized ones and GPT-2's included."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def in_and_out(layer: Any) -> tuple[int, int]:
    """How many features a linear layer takes, and how many it gives."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
