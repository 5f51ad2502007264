"""How far several deltas pull the same entry both ways, estimated on entries drawn at random.

Signs belong to entries of ΔW, which factors do not show. An entry costs one row of the left and one column of the right
factor, so a few thousand entries of every matrix are computed, and the standard error says how far that carries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from peftkit.deltas.delta import LowRank

SAMPLE = 4096
"""Entries drawn for each tensor."""


@dataclass(frozen=True)
class Estimate:
    """A share between 0 and 1 and its standard error, 0 where every entry was looked at."""

    share: float
    error: float


@dataclass(frozen=True)
class Sample:
    """What was seen of one matrix: for every drawn entry the mass Σ |weight · ΔW|, and parts of it."""

    size: int
    """Entries of the matrix."""
    mass: torch.Tensor
    """Of each drawn entry, float64."""
    conflict: torch.Tensor
    """That mass where two deltas have different signs, 0 elsewhere."""
    outvoted: torch.Tensor
    """The mass of the sign with less of it: what an election by mass (TIES, arXiv 2306.01708) takes away."""

    @property
    def whole(self) -> bool:
        """Whether every entry is in it."""
        return bool(self.mass.numel() == self.size)


def sample(deltas: Sequence[LowRank], weights: Sequence[float], name: str, seed: int, count: int = SAMPLE) -> Sample:
    """Look at `count` entries of a matrix, drawn with replacement; at all of them when it has no more.

    The draw depends on the seed and `name` alone. No tensor is larger than count × the largest rank.
    """
    rows, columns = deltas[0].matrix
    size = rows * columns
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "replace")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    drawn = torch.arange(size) if size <= count else torch.randint(size, (count,), generator=generator)
    row, column = drawn // columns, drawn % columns
    values = torch.stack([_entries(delta, row, column) * w for delta, w in zip(deltas, weights, strict=True)])
    up, down = values.clamp(min=0).sum(0), -values.clamp(max=0).sum(0)
    mass, less = up + down, torch.minimum(up, down)
    return Sample(size, mass, torch.where(less > 0, mass, torch.zeros_like(mass)), less)


def conflict(samples: Iterable[Sample]) -> Estimate | None:
    """The share of the |ΔW| mass that lies on entries where signs disagree; None where all deltas are zero."""
    return _ratio([(each, each.conflict) for each in samples])


def outvoted(samples: Iterable[Sample]) -> Estimate | None:
    """The share of the |ΔW| mass that has the weaker sign of its entry; None where all deltas are zero."""
    return _ratio([(each, each.outvoted) for each in samples])


def _ratio(samples: Sequence[tuple[Sample, torch.Tensor]]) -> Estimate | None:
    """The combined ratio estimate over matrices as strata, with its standard error.

    Cochran, Sampling Techniques (1977), section 6.11: var = Σ N² s²(y − R x) / n over (Σ N x̄)².
    """
    whole = sum(each.size * float(each.mass.mean()) for each, _ in samples if each.size)
    if not whole:
        return None
    ratio = sum(each.size * float(part.mean()) for each, part in samples if each.size) / whole
    spread = sum(
        each.size**2 * float((part - ratio * each.mass).var()) / part.numel()
        for each, part in samples
        if not each.whole
    )
    return Estimate(ratio, math.sqrt(spread) / whole)


def _entries(delta: LowRank, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return (delta.left[row].double() * delta.right[:, column].T.double()).sum(1) * delta.scale
