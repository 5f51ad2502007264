"""What several adapters do to a base together, for a merge that makes no adapter of them: no rank, no residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from peftkit.base.dense import Dense
from peftkit.deltas.combining.lineup import Tensor, line_up
from peftkit.deltas.combining.methods import How
from peftkit.deltas.delta import Additive, Delta, Deltas, Rows, Stacked


@dataclass(frozen=True)
class Computed(Additive):
    """A result as its numbers, in memory while its tensor is merged."""

    kind: ClassVar[str] = "combined"

    shape: tuple[int, ...]
    values: torch.Tensor
    """Float64, of shape `matrix`."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of `values`."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW."""
        return self.values[first:last]


@dataclass(frozen=True)
class Together(Delta):
    """A method's result on one tensor, computed from the parts' ΔW on the base when its rows are asked for.

    Sums are computed for the asked rows alone; other methods look at the whole tensor, once it is `prepared`.
    """

    kind: ClassVar[str] = "combined"
    additive: ClassVar[bool] = False

    shape: tuple[int, ...]
    tensor: Tensor
    how: How

    @property
    def label(self) -> str:
        """The parts' kinds, combined."""
        return "combined " + ", ".join(sorted({part.delta.kind for part in self.tensor.parts}))

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns); fused experts lie one below the other."""
        return self.tensor.matrix

    @property
    def working_bytes(self) -> int:
        """All parts' ΔW with what trimming and voting make of them: 17 matrices were measured for three adapters."""
        if self.how.entry.additive or self.how.entry.factored:
            return 0
        rows, columns = self.matrix
        return 8 * rows * columns * (3 * len(self.tensor.parts) + 8)

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of the result, shape (last - first, columns)."""
        if self.how.entry.additive:
            parts = [self.tensor.change(part, first, last, base) * part.weight for part in self.tensor.parts]
            return sum(parts[1:], parts[0])
        return self._whole(base)[first:last]

    def prepared(self, base: Rows) -> Delta:
        """From the parts' factors where the method has a way, else as numbers unless it is a sum."""
        blocks = [self.tensor.factored(block, self.how) for block in self.tensor.blocks]
        factors = [block for block in blocks if block is not None]
        if len(factors) == len(blocks):
            whole = Stacked(self.shape, tuple(factors)) if self.tensor.fused else factors[0]
            return whole.prepared(base)
        return self if self.how.entry.additive else Computed(self.shape, self._whole(base))

    def _whole(self, base: Rows) -> torch.Tensor:
        return torch.cat([self.tensor.combined(block, self.how, base) for block in self.tensor.blocks])

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Base plus result, shape (last - first, columns); rows that the base lacks are the result alone."""
        rows = self.change(first, last, base).clone()
        common = max(0, min(last, self.tensor.held) - first)
        if common:
            rows[:common] += base(first, first + common)
        return rows


def merged_deltas(parents: Sequence[Deltas], weights: Sequence[float], how: How, base: Mapping[str, Dense]) -> Deltas:
    """The method's result on any kinds of adapters of one base, as deltas to merge: LoRA, DoRA, IA3, replacements.

    `exact`, `svd` and `linear` are all Σ wᵢ ΔWᵢ here, since nothing is brought to a rank. Raises DeltaError, naming the
    tensors, when the adapters do not fit together.
    """
    lineup = line_up(parents, weights, how, base)
    named = ", ".join(f"{parent.reference}:{weight:g}" for parent, weight in zip(parents, weights, strict=True))
    changes = {name: Together(tensor.shape, tensor, how) for name, tensor in lineup.tensors.items()}
    places = {name: tensor.place for name, tensor in lineup.tensors.items()}
    return Deltas(f"{how.method}({named})", changes, places, lineup.sources, lineup.shared)
