"""How the tokens of a batch are put into groups of one adapter each, so that one matrix product serves them all.

A product of stacked matrices (`bmm`) wants groups of one width. The ways to form them (one group for each adapter, also
with those that lie between; one for each row; blocks of so many tokens) are compared for every batch, and the cheapest
is taken; which it is depends on the batch alone, not on the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

NO_SLOT = -1
"""The slot of tokens that the base answers alone."""

# What costs as much as one token's products with the factors of rank 16: reading a slot's factors where they lie, and
# copying them together first (2 cores, widths 576 and 1536; see docs/decisions/0016).
_READ, _COPY = 6, 24


@dataclass(frozen=True)
class Layout:
    """Groups of tokens, `width` places each; all tokens of a group belong to one slot."""

    slots: slice | torch.Tensor
    """Whose factors each group takes: neighbours in the bank, or int64 indices of shape (groups,)."""
    groups: int
    width: int
    order: torch.Tensor | None
    """The token at each place, int64 of shape (groups · width,); None: the tokens as they come. A place that nobody
    needs holds some token, and its result is dropped."""
    tokens: torch.Tensor | None
    """The tokens that an adapter changes, int64; None: all of them."""
    back: torch.Tensor | None
    """The place of each of those tokens; None where `order` is."""

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of shape (tokens, in) → (groups, width, in)."""
        placed = x if self.order is None else x.index_select(0, self.order)
        return placed.view(self.groups, self.width, x.shape[1])

    def add(self, out: torch.Tensor, hidden: torch.Tensor, factors: torch.Tensor) -> None:
        """Add hidden (groups, width, r) @ factors (groups, r, out) to `out` of shape (tokens, out), in place."""
        if self.order is None:
            out.view(self.groups, self.width, out.shape[1]).baddbmm_(hidden, factors)
            return
        placed = product(hidden, factors).view(-1, out.shape[1]).index_select(0, self.back)
        if self.tokens is None:
            out += placed
        else:
            out.index_add_(0, self.tokens, placed)


def lay_out(slots: Sequence[int], length: int, device: torch.device) -> Layout | None:
    """The cheapest layout for rows of `length` tokens, one slot for each row; None when no row has an adapter.

    A row of tokens of different adapters is given as rows of one token.
    """
    rows = [row for row, slot in enumerate(slots) if slot != NO_SLOT]
    if not rows:
        return None
    counts: dict[int, int] = {}
    for row in rows:
        counts[slots[row]] = counts.get(slots[row], 0) + length
    distinct, widest = sorted(counts), max(counts.values())
    span = list(range(distinct[0], distinct[-1] + 1))
    candidates = [(distinct, widest), (span, widest), ([slots[row] for row in rows], length)]
    width = length
    while (width := 2 * width) < widest:
        candidates.append(([slot for slot in distinct for _ in range(-(-counts[slot] // width))], width))
    groups, width = min(candidates, key=lambda candidate: _cost(*candidate))
    return _indexed(_places(slots, groups, width, length), groups, width, len(slots) * length, device)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of stacked matrices in their own dtype: autocast leaves alone what is told where to write."""
    return torch.bmm(left, right, out=left.new_empty(left.shape[0], left.shape[1], right.shape[2]))


def _cost(groups: list[int], width: int) -> int:
    return len(groups) * ((_READ if _consecutive(groups) else _COPY) + width)


def _consecutive(groups: list[int]) -> bool:
    return groups == list(range(groups[0], groups[0] + len(groups)))


def _places(slots: Sequence[int], groups: list[int], width: int, length: int) -> list[list[int]]:
    """The tokens of each group: the next ones of its slot, in the order of the batch."""
    of: dict[int, list[int]] = {slot: [] for slot in (*groups, NO_SLOT)}
    for row, slot in enumerate(slots):
        of[slot] += range(row * length, (row + 1) * length)
    left = {slot: iter(tokens) for slot, tokens in of.items()}
    return [list(islice(left[slot], width)) for slot in groups]


def _indexed(places: list[list[int]], groups: list[int], width: int, total: int, device: torch.device) -> Layout:
    taken = slice(groups[0], groups[0] + len(groups)) if _consecutive(groups) else torch.tensor(groups, device=device)
    in_order = [token for tokens in places for token in tokens]
    if in_order == list(range(total)) and len(places) * width == total:
        return Layout(taken, len(groups), width, None, None, None)
    filled = [token for tokens in places for token in tokens + [0] * (width - len(tokens))]
    place = {token: i * width + j for i, tokens in enumerate(places) for j, token in enumerate(tokens)}
    adapted = sorted(place)
    index = {"dtype": torch.long, "device": device}
    return Layout(
        slots=taken,
        groups=len(groups),
        width=width,
        order=torch.tensor(filled, **index),
        tokens=None if len(adapted) == total else torch.tensor(adapted, **index),
        back=torch.tensor([place[token] for token in adapted], **index),
    )
