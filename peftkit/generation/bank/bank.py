"""A model whose every linear layer can add the deltas of many adapters, each to the tokens that asked for it.

The number of matrix products does not depend on how many adapters are in the batch: one for each set of layers with a
common input, one for each layer (Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, gather in a kernel of their
own; here the factors lie stacked, and the tokens are put into groups of one width).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn

from peftkit.generation.bank.layout import NO_SLOT, Layout, lay_out
from peftkit.generation.bank.sites import Group, Seating, Site, in_and_out, linear_layers
from peftkit.tuning.skeleton import skeleton

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Path of a linear layer → (A of shape (r, in), B · scaling of shape (out, r))."""


class Bank:
    """Slots for the factors of adapters, beside a second tree of modules over a base's tensors.

    Adapters come and go without a change to the tree. One batch at a time is seated, and no slot changes meanwhile:
    other threads wait, and whoever does either within a batch of the same thread gets RuntimeError.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, device: torch.device, slots: int = 32) -> None:
        """`model` is the base's; `dtype` is what factors are kept and applied in; `slots` is how many fit at most."""
        self.most, self.dtype, self.device = slots, dtype, device
        self._seating = Seating()
        self.model = skeleton(model)
        together = _common_inputs(self.model, device)
        self._groups = _set_in(self.model, together, self._seating)
        self._lock, self._busy = RLock(), False
        self._last: tuple[Any, Mapping[int, Layout]] = (None, {})

    def put(self, slot: int, factors: Factors) -> None:
        """Fill a slot, replacing what stood in it; the stacks grow as needed, in slots by doubling.

        Raises KeyError for a path that is no linear layer, ValueError for factors of other shapes than the layer's, and
        IndexError for a slot that there cannot be; nothing has changed then.
        """
        if not 0 <= slot < self.most:
            raise IndexError(slot)
        ranks = self.ranks
        wider = {name: max(rank, ranks.get(name, 0)) for name, rank in self._ranks(factors).items()}
        self.resize(max(self.slots, min(self.most, 1 << slot.bit_length())), {**ranks, **wider})
        self.fill(slot, factors)

    def clear(self, slot: int) -> None:
        """Empty a slot: the base answers its rows."""
        self.fill(slot, {})

    @property
    def paths(self) -> frozenset[str]:
        """The linear layers that it can add to."""
        return frozenset(name for group in self._groups for name in group.names)

    @property
    def bytes(self) -> int:
        """Memory of the stacks."""
        item = self.dtype.itemsize
        return sum(group.bytes_for(group.slots, group.ranks, item) for group in self._groups)

    @contextmanager
    def seated(self, slots: Sequence[int], length: int) -> Iterator[Any]:
        """The model for a batch of `len(slots)` rows of `length` tokens, row i answered by slot i (NO_SLOT: the base).

        For a row that holds tokens of different adapters, give one slot for each token and length 1. Raises IndexError
        for a slot that the stacks do not have.
        """
        with self._lock:
            self._check_nobody_seated()
            try:
                self._busy = True
                self._seating.layouts = self._layouts(tuple(slots), length)
                yield self.model
            finally:
                self._busy = False
                self._seating.layouts = {}
                for group in self._groups:
                    group.forget()

    def bytes_for(self, slots: int, ranks: Mapping[str, int]) -> int:
        """Memory of stacks of so many slots with these ranks, path → rank."""
        item = self.dtype.itemsize
        return sum(group.bytes_for(slots, group.ranks_of(ranks), item) for group in self._groups)

    @property
    def slots(self) -> int:
        """How many slots every layer's stacks have at least."""
        return min((group.slots for group in self._groups), default=0)

    @property
    def ranks(self) -> dict[str, int]:
        """Path of a linear layer → the rank of its stacks, where it is above 0."""
        pairs = [pair for group in self._groups for pair in zip(group.names, group.ranks, strict=True)]
        return {name: rank for name, rank in pairs if rank}

    def fill(self, slot: int, factors: Factors) -> None:
        """`put` for stacks that are large enough: they do not change their size, and IndexError or ValueError is raised
        where they are too small."""
        if not 0 <= slot < self.slots:
            raise IndexError(slot)
        ranks = self.ranks
        if larger := [name for name, rank in self._ranks(factors).items() if rank > ranks.get(name, 0)]:
            raise ValueError(f"the stacks of {larger[0]} have rank {ranks.get(larger[0], 0)}")
        with self._changing():
            for group in self._groups:
                group.put(slot, factors)

    def resize(self, slots: int, ranks: Mapping[str, int]) -> None:
        """Give the stacks so many slots and these ranks, more or fewer; what lies beyond is lost, all else stays.

        When it raises, every layer's stacks are as they were or as they were to be, and what stays is in them.
        """
        with self._changing():
            for group in self._groups:
                group.resize(slots, group.ranks_of(ranks), self.dtype, self.device)

    def take(self, slot: int, ranks: Mapping[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A copy on the CPU of what was put into a slot, in the bank's dtype; `ranks` are its own, path → rank."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in self._groups:
            found |= group.take(slot, ranks)
        return found

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another, both within the stacks."""
        with self._changing():
            for group in self._groups:
                group.move(source, target)

    def _layouts(self, slots: tuple[int, ...], length: int) -> Mapping[int, Layout]:
        """The layouts of a batch, by how many tokens of it a layer is given; made once for the steps of one."""
        known = self.slots
        if absent := [slot for slot in slots if slot != NO_SLOT and not 0 <= slot < known]:
            raise IndexError(absent[0])
        if self._last[0] != (slots, length):
            made = {len(slots) * each: lay_out(slots, each, self.device) for each in {1, length}}
            self._last = (slots, length), {tokens: layout for tokens, layout in made.items() if layout is not None}
        return self._last[1]

    def _ranks(self, factors: Factors) -> dict[str, int]:
        """The rank for each path. Raises KeyError and ValueError for factors that belong to no layer."""
        sizes = {
            name: (group.inputs, out)
            for group in self._groups
            for name, out in zip(group.names, group.widths, strict=True)
        }
        ranks = {}
        for name, (right, left) in factors.items():
            (inputs, out), rank = sizes[name], int(right.shape[0])
            if right.shape != (rank, inputs) or left.shape != (out, rank):
                raise ValueError(f"{name} takes {inputs} and gives {out}: {tuple(right.shape)}, {tuple(left.shape)}")
            ranks[name] = rank
        return ranks

    @contextmanager
    def _changing(self) -> Iterator[None]:
        # Stacks made in inference mode could be written to in that mode alone; factors may be somebody's parameters.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_nobody_seated()
            yield

    def _check_nobody_seated(self) -> None:
        if self._busy:
            raise RuntimeError("a batch is seated: it must end before another one, and before a slot changes")


def _common_inputs(model: Any, device: torch.device) -> list[list[str]]:
    """Paths of linear layers, those that an input reaches as the very same tensor together.

    Asking the model is what works for every architecture. A layer that is not given every token, as an expert's, is
    left out: which adapter its tokens belong to cannot be told there.
    """
    layers = linear_layers(model)
    seen: dict[tuple[int, int], list[str]] = {}
    kept: list[torch.Tensor] = []
    partly: set[str] = set()
    ids = torch.arange(6, device=device).view(2, 3)  # different ones: a router sends equal tokens to one expert

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept.append(inputs[0])  # kept alive, so that no other tensor takes its id
            width = in_and_out(module)[0]
            if inputs[0].numel() != ids.numel() * width:
                partly.add(name)
            key = id(inputs[0]), inputs[0]._version, width
            seen.setdefault(key, []).append(name)  # type: ignore[arg-type]

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no version
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(name for names in seen.values() for name in names)
    once = [names for names in seen.values() if all(calls[name] == 1 and name not in partly for name in names)]
    grouped = {name for names in once for name in names}
    return [*once, *([name] for name in calls if name not in grouped | partly)]


def _set_in(model: nn.Module, together: list[list[str]], seating: Seating) -> list[Group]:
    """Put a site in place of these linear layers of the tree."""
    layers = linear_layers(model)
    groups = []
    for names in together:
        sizes = [in_and_out(layers[name]) for name in names]
        group = Group(names, [out for _, out in sizes], sizes[0][0], seating)
        groups.append(group)
        for i, name in enumerate(names):
            parent, _, key = name.rpartition(".")
            holder = model.get_submodule(parent)
            holder._modules[key] = Site(layers[name], group, i)
    return groups
