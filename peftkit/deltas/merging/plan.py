"""What a merge will change, write and need, known from headers alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.building import Building
from peftkit.deltas.merging.layout import Shard
from peftkit.deltas.merging.product import STEP, STEPS, Copied, Product, Rounded
from peftkit.deltas.merging.requantized import Requantized
from peftkit.deltas.merging.stream import AHEAD, WORKERS
from peftkit.deltas.merging.work import tensors_of
from peftkit.errors import DeltaError
from peftkit.render import size

_COMPANIONS = 64 << 20
"""Room for tokenizer files and the receipt."""
_BUFFERS = 8 * 8
"""Bytes for each number that a worker computes at once: eight float64 buffers."""
_JOB = 8 + (AHEAD // WORKERS + 1) * 4
"""Bytes for each number of a job, at most: read, and of jobs that wait to be written, for each worker."""


@dataclass(frozen=True)
class MergePlan:
    """The figures of `--dry-run`."""

    changed: tuple[str, ...]
    """Tensors that the adapter changes."""
    tensors: int
    files: tuple[str, ...]
    bytes_out: int
    peak_memory: int
    """Above the imports: the adapter, and what one tensor needs at once."""
    memory_free: int
    disk_needed: int
    disk_free: int

    def check_room(self) -> None:
        """Raise DeltaError when memory or disk lack room."""
        if self.memory_free < self.peak_memory:
            raise DeltaError(
                f"the merge needs {size(self.peak_memory)} of memory and {size(self.memory_free)} are free",
                expected="room for the largest tensor as its method needs it",
                hint="close other programs, or combine by exact or knots, which work on the adapters' factors",
            )
        if self.disk_free < self.disk_needed:
            raise DeltaError(
                f"the merged model needs {size(self.disk_needed)} and the disk has {size(self.disk_free)} free",
                expected="room for the whole model before anything is written",
                hint="free some space, choose an --out on another disk, or write less with --dtype or --quantize",
            )


def plan_of(products: Sequence[Product], shards: Sequence[Shard], deltas: Deltas, building: Building) -> MergePlan:
    """The figures for these tensors in these files; what an interrupted merge left counts as room."""
    total = sum(shard.bytes for shard in shards)
    place = next(folder for folder in building.folder.absolute().parents if folder.is_dir())
    return MergePlan(
        tuple(sorted(deltas.changes)),
        sum(len(unit.entries) for shard in shards for unit in shard.units),
        tuple(shard.file for shard in shards),
        total,
        _peak(products, deltas),
        int(psutil.virtual_memory().available),
        total + _COMPANIONS,
        shutil.disk_usage(place).free + _present(building.model),
    )


def _present(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) if model.is_dir() else 0


def _peak(products: Sequence[Product], deltas: Deltas) -> int:
    """Adapter as stored, and the largest need of one tensor: factors in float64, buffers, codes of quantized ones."""
    stored: int = sum(
        tensor.numel() * tensor.element_size() for delta in deltas.changes.values() for tensor in tensors_of(delta)
    )
    dense = max((delta.working_bytes for delta in deltas.changes.values()), default=0)
    return stored + dense + WORKERS * int(max((_needs(product) for product in products), default=0))


def _needs(product: Product) -> int:
    if isinstance(product, Copied):
        return AHEAD * (1 << 22)
    if not isinstance(product, Rounded | Requantized):
        return 0
    weight = product.weight
    rows, columns = weight.matrix
    factors = 8 * sum(tensor.numel() for tensor in tensors_of(weight.delta)) if weight.delta else 0
    codes = rows * columns * ((6 if weight.transposed else 1) if weight.simulate else 0)
    codes += rows * columns * ((16 if weight.transposed else 2) if isinstance(product, Requantized) else 0)
    largest = max(STEP, columns)
    return int(factors + codes + _BUFFERS * largest + _JOB * min(STEPS * largest, rows * columns))
