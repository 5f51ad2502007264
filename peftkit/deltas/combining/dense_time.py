"""About how long a method that needs every entry of ΔW would take on this machine, from one measured piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peftkit.deltas.spectrum import dense_svd

_PIECE = 384  # rows and columns of what is measured
_RANK = 16


@dataclass(frozen=True)
class DenseTime:
    """Seconds that a dense method would take, to choose by: good to a factor of 4 or so, and as busy as the machine."""

    entries_seconds: float
    """To compute ΔW of every adapter, cut it by magnitude, elect signs and add up, as TIES does."""
    svd_seconds: float
    """To decompose every result, which makes an adapter of it; merging it directly does without."""

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.entries_seconds + self.svd_seconds


def dense_time(matrices: Sequence[tuple[int, int, int]], clock: Callable[[], float] = time.perf_counter) -> DenseTime:
    """Estimate for `matrices`, each (rows, columns, number of adapters that change it).

    Measured on one matrix of 384 × 384 and rank 16; scaled by entries · adapters, and by entries · min(rows, columns).
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_PIECE, _RANK, dtype=torch.float64, generator=generator)
    dense = left @ torch.randn(_RANK, _PIECE, dtype=torch.float64, generator=generator)
    treat = _seconds(lambda: _treated(left, dense[:_RANK]), clock)
    decompose = _seconds(lambda: dense_svd(dense), clock)
    entries = sum(rows * columns * adapters for rows, columns, adapters in matrices)
    cubes = sum(rows * columns * min(rows, columns) for rows, columns, _ in matrices)
    return DenseTime(treat * entries / _PIECE**2, decompose * cubes / _PIECE**3)


def _treated(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What TIES does with the entries of one adapter: its ΔW, the largest half of it, their signs, their sum."""
    change = left @ right
    size = change.abs().flatten()
    kept = torch.where(change.abs() >= size.kthvalue(size.numel() // 2).values, change, 0.0)
    return torch.where(kept.sign() == kept.sign(), kept, 0.0)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The faster of two: the first one also loads libraries."""
    taken = []
    for _ in range(2):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken)
