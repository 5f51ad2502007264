"""Additive deltas that are products of small matrices other than B @ A; each has exact low-rank factors too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from peftkit.deltas.delta import Additive, Delta, LowRank


@dataclass(frozen=True)
class Hadamard(Additive):
    """ΔW = scale · (B₁@A₁) ⊙ (B₂@A₂), of rank r₁·r₂ at most (LoHa, arXiv 2108.06098, proposition 1)."""

    kind: ClassVar[str] = "LoHa"

    shape: tuple[int, ...]
    one: LowRank
    two: LowRank
    scale: float = 1.0

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW."""
        return self.one.rows(first, last) * self.two.rows(first, last) * self.scale

    def factored(self) -> LowRank:
        """The same ΔW as left @ right, of rank r₁·r₂, float64: columns of one times columns of the other."""
        left = self.one.left.double()[:, :, None] * self.two.left.double()[:, None, :]
        right = self.one.right.double()[:, None, :] * self.two.right.double()[None, :, :]
        scale = self.scale * self.one.scale * self.two.scale
        return LowRank(self.shape, left.flatten(1), right.flatten(0, 1), scale)


@dataclass(frozen=True)
class Kronecker(Additive):
    """ΔW = scale · one ⊗ two (LoKr, arXiv 2309.14859, section 4.2); a convolution's `two` counts its kernel."""

    kind: ClassVar[str] = "LoKr"

    shape: tuple[int, ...]
    one: LowRank
    two: LowRank
    scale: float = 1.0

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of ΔW: row i·b + p is row i of `one` ⊗ row p of `two`, which has b rows."""
        wanted, below = torch.arange(first, last), self.two.shape[0]
        outer = self.one.rows(0, self.one.shape[0])[wanted // below]
        inner = self.two.rows(0, below)[wanted % below]
        return (outer[:, :, None] * inner[:, None, :]).flatten(1) * self.scale

    def factored(self) -> LowRank:
        """The same ΔW as left @ right, float64: (L₁R₁) ⊗ (L₂R₂) = (L₁ ⊗ L₂)(R₁ ⊗ R₂)."""
        left = torch.kron(self.one.left.double(), self.two.left.double())
        right = torch.kron(self.one.right.double(), self.two.right.double())
        return LowRank(self.shape, left, right, self.scale * self.one.scale * self.two.scale)


def whole(matrix: torch.Tensor) -> LowRank:
    """A matrix as factors: itself and the identity, on its longer side."""
    rows, columns = matrix.shape
    if columns <= rows:
        return LowRank((rows, columns), matrix, torch.eye(columns, dtype=matrix.dtype))
    return LowRank((rows, columns), torch.eye(rows, dtype=matrix.dtype), matrix)


def factored(delta: Delta) -> LowRank | None:
    """A delta's exact low-rank factors; None where it has none (a bias, DoRA, a saved tensor, fused experts)."""
    if isinstance(delta, LowRank):
        return delta
    return delta.factored() if isinstance(delta, Hadamard | Kronecker) else None
