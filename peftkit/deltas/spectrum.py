"""Norms, angles and the best approximation of low-rank deltas, from their factors.

Nothing here builds an m × n or m × m matrix: thin QR of both factors leaves a k × k core (k is the rank, or the sum of
ranks of stacked adapters), so the cost is O((m + n) k²).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftkit.deltas.delta import LowRank

_ROUNDING = 1e-12
Spaces = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Angles:
    """Cosines of the principal angles between two subspaces: 1 is a shared direction, 0 a right angle."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, cosines: Sequence[torch.Tensor]) -> Angles | None:
        """Of the angles between some pairs of subspaces; None where there is none."""
        every = torch.cat(list(cosines)) if cosines else torch.empty(0)
        return cls(float(every.mean()), float(every.min()), float(every.max())) if every.numel() else None


@dataclass(frozen=True)
class Svd:
    """left · diag(values) · right, float64: left (m, q) and right (q, n) orthonormal, values falling."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def stacked(deltas: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Σ weight · ΔW exactly, as one delta whose rank is the sum of the ranks; its factors are float64."""
    given = [1.0] * len(deltas) if weights is None else weights
    left = torch.cat([d.left.double() * (d.scale * w) for d, w in zip(deltas, given, strict=True)], dim=1)
    return LowRank(deltas[0].shape, left, torch.cat([d.right.double() for d in deltas]))


def joint(deltas: Sequence[LowRank]) -> list[LowRank]:
    """The same deltas in coordinates of the spaces that all of them write to and read from, float64.

    left = Q · (rest) with one orthonormal Q for all, which is never formed: norms, products, angles, sums and singular
    values are those of the deltas, of shape (Σ rank, Σ rank) at most.
    """
    ranks = [delta.rank for delta in deltas]
    lefts = _triangle(torch.cat([delta.left.double() for delta in deltas], dim=1))
    rights = _triangle(torch.cat([delta.right.double() for delta in deltas]).T)
    shape = (lefts.shape[0], rights.shape[0])
    pairs = zip(deltas, lefts.split(ranks, dim=1), rights.split(ranks, dim=1), strict=True)
    return [LowRank(shape, left, right.T, delta.scale) for delta, left, right in pairs]


def svd(delta: LowRank) -> Svd:
    """The singular value decomposition of ΔW, with at most `rank` values."""
    left, core, right = _core(delta)
    u, values, vh = torch.linalg.svd(core, full_matrices=False)
    return Svd(left @ u, values, vh @ right)


def dense_svd(matrix: torch.Tensor) -> Svd:
    """The singular value decomposition of a float64 matrix (m, n), from the Gram matrix of its shorter side.

    left · diag(values) · right is the matrix to rounding, and cutting it at any rank loses exactly the values behind,
    whatever the accuracy of the vectors: right is left's own projection. Values below 1e-8 of the largest are noise.
    LAPACK's SVD takes 5 times as long (576 × 1536).
    """
    if matrix.shape[0] > matrix.shape[1]:
        found = dense_svd(matrix.T)
        return Svd(found.right.T, found.values, found.left.T)
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors.flip(1)
    projected = left.T @ matrix
    values = torch.linalg.vector_norm(projected, dim=1)
    return Svd(left, values, projected / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None])


def norm(delta: LowRank) -> float:
    """‖ΔW‖ (Frobenius)."""
    upper, lower = _triangle(delta.left.double()), _triangle(delta.right.double().T)
    return float(torch.linalg.matrix_norm(upper @ lower.T)) * abs(delta.scale)


def inner(one: LowRank, other: LowRank) -> float:
    """⟨ΔW₁, ΔW₂⟩: the sum of all products of entries."""
    lefts = one.left.double().T @ other.left.double()
    rights = one.right.double() @ other.right.double().T
    return float((lefts * rights).sum()) * one.scale * other.scale


def cosine(one: LowRank, other: LowRank) -> float:
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), 0 where either is zero."""
    lengths = norm(one) * norm(other)
    return inner(one, other) / lengths if lengths else 0.0


def truncated(delta: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best delta of that rank, and its error ‖ΔW − that‖ = √Σ_{i>rank} σᵢ² (Eckart and Young, 1936).

    The factors share the singular values evenly; rank is filled up with zeros where ΔW has less.
    """
    found = svd(delta)
    kept = min(rank, int(found.values.numel()))
    root = found.values[:kept].sqrt()
    left, right = found.left[:, :kept] * root, found.right[:kept] * root[:, None]
    error = float(torch.linalg.vector_norm(found.values[kept:])) if kept < found.values.numel() else 0.0
    return LowRank(delta.shape, _filled(left, rank, 1), _filled(right, rank, 0)), error


def principal_cosines(one: LowRank, other: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of the principal angles between what two deltas write (column spaces) and read (row spaces), falling.

    Björck and Golub, Math. Comp. 27 (1973): the singular values of Q₁ᵀQ₂.
    """
    return angles(spaces(one), spaces(other))


def angles(one: Spaces, other: Spaces) -> tuple[torch.Tensor, torch.Tensor]:
    """`principal_cosines` of deltas whose spaces are known."""
    write, read = (torch.linalg.svdvals(a.T @ b).clamp(max=1.0) for a, b in zip(one, other, strict=True))
    return write, read


def spaces(delta: LowRank) -> Spaces:
    """Orthonormal bases (columns) of the column and the row space, without directions that are zero but for rounding.

    What is below 1e-12 of the factors' norms is rounding: float32 factors themselves are known to 1e-7.
    """
    left, core, right = _core(delta)
    u, values, vh = torch.linalg.svd(core, full_matrices=False)
    lengths = torch.linalg.matrix_norm(delta.left.double()) * torch.linalg.matrix_norm(delta.right.double())
    kept = int((values > float(lengths) * abs(delta.scale) * _ROUNDING).sum())
    return left @ u[:, :kept], right.T @ vh[:kept].T


def rank_for(values: torch.Tensor, share: float) -> int:
    """The smallest rank that keeps `share` of the energy Σσ²; 0 for a delta of zeros."""
    energy = values.double().square().cumsum(0)
    if not energy.numel() or float(energy[-1]) == 0:
        return 0
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def relative(error: float, whole: float) -> float:
    """error / whole, 0 where both are zero."""
    return error / whole if whole else (0.0 if error == 0 else math.inf)


def _core(delta: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, core, right) with ΔW = left · core · right, left and right orthonormal."""
    left, upper = torch.linalg.qr(delta.left.double())
    right, lower = torch.linalg.qr(delta.right.double().T)
    return left, (upper @ lower.T) * delta.scale, right.T


def _triangle(factor: torch.Tensor) -> torch.Tensor:
    """R of the thin QR, shape (min(m, k), k)."""
    return torch.linalg.qr(factor, mode="r").R


def _filled(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)
