"""Deltas that turn the base's weights: W' = W · R, with R made of blocks along the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from peftkit.deltas.delta import Absolute, Rows


@dataclass(frozen=True)
class Rotated(Absolute):
    """W' = W · diag(blocks), or diag(blocks) · W where the inputs are the rows (OFT, arXiv 2306.07280)."""

    kind: ClassVar[str] = "OFT"

    shape: tuple[int, ...]
    blocks: torch.Tensor
    """Shape (number, b, b), float64; number · b is the extent that is turned."""
    rows_turn: bool = False

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of W'. Where rows turn, the base is read in whole blocks."""
        number, extent, _ = self.blocks.shape
        if not self.rows_turn:
            rows = base(first, last).unflatten(1, (number, extent))
            return torch.einsum("rnk,nkc->rnc", rows, self.blocks).flatten(1)
        top, bottom = first // extent, -(-last // extent)
        rows = base(top * extent, bottom * extent).unflatten(0, (bottom - top, extent))
        turned = torch.einsum("nck,nkr->ncr", self.blocks[top:bottom], rows).flatten(0, 1)
        return turned[first - top * extent : last - top * extent]


def skew(vectors: torch.Tensor, extent: int) -> torch.Tensor:
    """Skew-symmetric matrices (n, extent, extent) from what stands above their diagonals, row by row; float64."""
    above = torch.zeros(vectors.shape[0], extent, extent, dtype=torch.float64)
    rows, columns = torch.triu_indices(extent, extent, 1)
    above[:, rows, columns] = vectors.double()
    return above - above.transpose(1, 2)


def projected(matrices: torch.Tensor, eps: float) -> torch.Tensor:
    """Matrices whose norm exceeds eps/√n, n their number, shrunk to that norm (constrained OFT)."""
    limit = eps / matrices.shape[0] ** 0.5
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    return torch.where(norms <= limit, matrices, limit * (matrices / norms))


def cayley(matrices: torch.Tensor) -> torch.Tensor:
    """(I - Q)(I + Q)⁻¹: orthogonal where Q is skew-symmetric."""
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(identity + matrices, identity - matrices, left=False)


def cayley_series(matrices: torch.Tensor, terms: int) -> torch.Tensor:
    """What PEFT computes for it: I + 2Q + 2Q² + … + Q^(terms-1), the last power once (peft 0.21.2, oft/layer.py)."""
    turned = torch.eye(matrices.shape[-1], dtype=torch.float64).expand_as(matrices).clone()
    if terms <= 1:
        return turned
    turned += 2 * matrices
    if terms > 2:
        power = matrices @ matrices
        turned += 2 * power
        for _ in range(3, terms - 1):
            power = power @ matrices
            turned += 2 * power
        turned += power @ matrices
    return turned
