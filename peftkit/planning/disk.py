"""Bytes that a run leaves on the disk, and whether they have room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peftkit.planning.architecture import Architecture
from peftkit.planning.factors import shared_bytes
from peftkit.planning.layers import SIZES
from peftkit.planning.setting import Setting
from peftkit.planning.weights import trained_parameters, trained_size, trained_tensors, trunk
from peftkit.render import size

Place = Literal["cache", "runs", "registry", "out"]

# An entry of a safetensors header (name, dtype, shape, offsets) is about 150 bytes; names of adapter tensors are long.
_HEADER = 150
# Random states, figures, schedule: torch's CPU state has 5,056 bytes, a CUDA device's 16, NumPy's and Python's 2,500.
_REST = 100_000
# bitsandbytes: a float32 maximum for each block of 256, and two tables of 256 float32 for each tensor.
_8BIT_STATES = 2 * (1 + 4 / 256)
_8BIT_TABLES = 2 * 256 * 4


@dataclass(frozen=True)
class DiskPart:
    """Files of one kind: where they go and how their bytes were counted."""

    name: str
    place: Place
    bytes: int
    formula: str


@dataclass(frozen=True)
class Disk:
    """A file system. Places on the same one share its free bytes."""

    id: str | int
    free_bytes: int


def disk_plan(
    architecture: Architecture,
    setting: Setting,
    *,
    base_present: bool,
    save_total_limit: int,
    keeps_best: bool,
    merged: bool = False,
    cached_tokens: int = 0,
) -> tuple[DiskPart, ...]:
    """What a run needs: the base unless its files are here, checkpoints, the adapter, and a merged export.

    A new checkpoint is whole on the disk before the oldest is removed, so one more than is kept has to fit.
    `cached_tokens` of all rows have their hidden states in the trunk's cache, where the setting has one.
    """
    kept = save_total_limit + int(keeps_best) + 1
    one = checkpoint_bytes(architecture, setting)
    which = f"the last {save_total_limit}{', the best' if keeps_best else ''} and one being written"
    trained = _trained(architecture, setting)
    shared = shared_bytes(architecture, setting)
    adapter = trained.bytes + shared + (trained.tensors + 2 * bool(shared)) * _HEADER
    how = f"{trained.width} B per trained parameter" + (f", and {size(shared)} of shared matrices" if shared else "")
    parts = [
        DiskPart("checkpoints", "runs", kept * one, f"{kept} of {size(one)}: {which}"),
        DiskPart("adapter", "registry", adapter, how),
    ]
    if setting.trunk_cache:
        size_of = SIZES[setting.dtype]
        states = cached_tokens * architecture.hidden * size_of
        formula = f"{cached_tokens:,} tokens × {architecture.hidden} × {size_of} B"
        parts.append(DiskPart("trunk cache", "cache", states, formula))
        parts.append(DiskPart("released trunk", "cache", trunk(architecture, setting), "as it is held in memory"))
    weights = architecture.parameters * 2
    if not base_present:
        parts.insert(0, DiskPart("base", "cache", weights, "2 B per parameter, as a 16-bit base is published"))
    if merged:
        parts.append(DiskPart("merged weights", "out", weights, "2 B per parameter"))
    return tuple(parts)


def checkpoint_bytes(architecture: Architecture, setting: Setting) -> int:
    """Bytes of one checkpoint: trained tensors, the optimizer's states, random states and figures."""
    trained = _trained(architecture, setting)
    entries = trained.tensors * _HEADER
    states = 0.0
    if setting.optim in ("adamw_8bit", "paged_adamw_8bit"):
        states = trained.parameters * _8BIT_STATES + trained.tensors * _8BIT_TABLES
        entries *= 7  # two states, their maxima and their tables
    elif setting.optim != "sgd":
        states = 2 * trained.bytes
        entries *= 4  # two states and a step count
    return int(trained.bytes + states) + entries + _REST


def check_free(parts: Sequence[DiskPart], disks: Mapping[Place, Disk]) -> list[str]:
    """One sentence for each disk that has less room than its parts need; places without a disk are not checked."""
    shares: dict[str | int, list[DiskPart]] = {}
    free: dict[str | int, int] = {}
    for part in parts:
        if (disk := disks.get(part.place)) is not None:
            shares.setdefault(disk.id, []).append(part)
            free[disk.id] = min(disk.free_bytes, free.get(disk.id, disk.free_bytes))
    return [_problem(mine, free[disk]) for disk, mine in shares.items() if _total(mine) > free[disk]]


@dataclass(frozen=True)
class _Trained:
    parameters: int
    tensors: int
    width: int

    @property
    def bytes(self) -> int:
        return self.parameters * self.width


def _trained(architecture: Architecture, setting: Setting) -> _Trained:
    tensors = sum(count for _, count in trained_tensors(architecture, setting))
    return _Trained(trained_parameters(architecture, setting), tensors, trained_size(setting))


def _total(parts: Sequence[DiskPart]) -> int:
    return sum(part.bytes for part in parts)


def _problem(parts: Sequence[DiskPart], free: int) -> str:
    what = ", ".join(f"{part.name} {size(part.bytes)} in {part.place}" for part in parts)
    return f"the disk has {size(free)} free and the run needs {size(_total(parts))} on it: {what}"
