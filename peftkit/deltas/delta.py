"""What an adapter does to one tensor of the base: its delta weight ΔW, or the tensor that takes the base's place.

A tensor is read as a matrix whose rows lie one behind the other in the file, so that a delta can be computed for some
rows at a time, in float64, beside a base that is never in memory as a whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from peftkit.backbone.headed import Headed

Rows = Callable[[int, int], torch.Tensor]
"""Rows `first` to `last` (excluded) of the base's tensor as float64, shape (last - first, columns)."""


class Delta(ABC):
    """What happens to one tensor of the base; all rows are those of `matrix`, all numbers float64."""

    kind: ClassVar[str]
    """What it is called in messages: `LoRA`, `DoRA`, `IA3` …"""
    additive: ClassVar[bool]
    """Whether ΔW is the same on every base, so that two of them add up."""
    shape: tuple[int, ...]
    """Of the tensor once it is merged, as the base's file has it."""

    @property
    def label(self) -> str:
        """Its kind; of what several adapters make together, theirs."""
        return self.kind

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the matrix that the tensor is read as; a vector is one row."""
        if len(self.shape) < 2:
            return 1, math.prod(self.shape)
        return self.shape[0], math.prod(self.shape[1:])

    @abstractmethod
    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of ΔW, shape (last - first, columns)."""

    @abstractmethod
    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of the merged tensor, shape (last - first, columns)."""

    def prepared(self, base: Rows) -> Delta:
        """The same delta, with what every piece of its rows would compute again computed once."""
        return self

    @property
    def working_bytes(self) -> int:
        """What `prepared` holds at once, beside factors: nothing, unless it needs every entry of the tensor."""
        return 0

    def dense(self, base: Rows) -> torch.Tensor:
        """ΔW as a whole, of shape `matrix`."""
        return self.change(0, self.matrix[0], base)


class Additive(Delta):
    """A delta that does not look at the base."""

    additive = True

    @abstractmethod
    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW."""

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        return self.rows(first, last)

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        return base(first, last) + self.rows(first, last)


class Absolute(Delta):
    """A delta that is defined by the tensor it ends at: ΔW is that minus the base."""

    additive = False

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        return self.merged(first, last, base) - base(first, last)


@dataclass(frozen=True)
class LowRank(Additive):
    """ΔW = scale · left @ right, of rank k at most (LoRA, arXiv 2106.09685, section 4.1: left is B, right is A)."""

    kind: ClassVar[str] = "LoRA"

    shape: tuple[int, ...]
    left: torch.Tensor
    """Shape (rows, k), as stored."""
    right: torch.Tensor
    """Shape (k, columns), as stored."""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """k: the number of columns of `left`, whether or not they are independent."""
        return int(self.left.shape[1])

    def prepared(self, base: Rows) -> LowRank:
        """With float64 factors that hold the scale."""
        left = (self.left.double() * self.scale).contiguous()
        return LowRank(self.shape, left, self.right.double().contiguous())

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW."""
        return (self.left[first:last].double() * self.scale) @ self.right.double()


@dataclass(frozen=True)
class Stacked(Additive):
    """One low-rank ΔW for each expert of a fused parameter of shape (experts, a, b)."""

    kind: ClassVar[str] = "LoRA of experts"

    shape: tuple[int, ...]
    blocks: tuple[LowRank, ...]
    """One of shape (a, b) for each expert."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(experts · a, b)."""
        return self.shape[0] * self.shape[1], self.shape[2]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW."""
        height = self.shape[1]
        parts = []
        for expert in range(first // height, -(-last // height)):
            top = expert * height
            parts.append(self.blocks[expert].rows(max(first - top, 0), min(last - top, height)))
        return torch.cat(parts) if parts else torch.empty(0, self.shape[2], dtype=torch.float64)


@dataclass(frozen=True)
class Added(Additive):
    """A small ΔW given by its numbers: a LoRA layer's own bias, a norm's."""

    kind: ClassVar[str] = "values"

    shape: tuple[int, ...]
    values: torch.Tensor
    """Shape `matrix`."""
    scale: float = 1.0

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW."""
        return self.values.reshape(self.matrix)[first:last].double() * self.scale


Layer = Literal["linear", "conv1d", "conv", "embedding", "experts", "bias", "other"]
"""What kind of layer a tensor belongs to: `conv1d` is GPT-2's linear layer, which stores its weight as (in, out);
`experts` is a parameter that is adapted by itself (`target_parameters`), as fused experts are."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's delta stands in a PEFT checkpoint."""

    module: str
    """As PEFT names it in its keys, without `base_model.model.`: `model.layers.0.self_attn.q_proj`."""
    layer: Layer
    parameter: str = "weight"
    """Name of the parameter within the module; for fused experts the one that `target_parameters` names."""
    transposed: bool = False
    """Whether fused experts are stored as (experts, in, out): their module says `is_transposed` (GPT-OSS)."""


@dataclass(frozen=True)
class Deltas:
    """All that one adapter does to a base."""

    reference: str
    """`name@version`, for messages and receipts."""
    changes: Mapping[str, Delta]
    """Tensor of the merged model, by its name in the base's files, → what happens to it."""
    places: Mapping[str, Place]
    """Tensor → where PEFT keeps its delta, to write a checkpoint of it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the base's files do not hold → the one they begin as: the head of a tied base → its embedding."""
    shared: Mapping[str, Place] = field(default_factory=dict)
    """Changed tensors that are another module's too → that module: an embedding that stays tied → the head."""
    headed: Headed | None = None
    """How the base's files lie under the head of a task that it was trained for; None under the language head."""
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of that head that the base's files do not hold, by their names in the model, as stored."""

    @property
    def untied(self) -> bool:
        """Whether head and embedding of a tied base part: the merged model's files need both."""
        return bool(self.sources)
