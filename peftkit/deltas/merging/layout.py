"""Which bytes go where: the units of a merged model in files of a given size, and the header of each file.

The safetensors format is a length, a JSON header and the tensors without gaps; shapes and dtypes are known before the
first number is computed, so the header is written first (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Float dtypes by their name in safetensors files."""
NAMES = {dtype: name for name, dtype in TORCH.items()} | {torch.uint8: "U8", torch.int8: "I8"}
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def alignment(self) -> int:
        """Bytes of one number."""
        return _WIDTHS.get(self.dtype, 1)


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together and lie one behind the other."""

    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """Of its first tensor."""
        return self.entries[0].name

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def alignment(self) -> int:
        """What its start must be a multiple of."""
        return max(entry.alignment for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header with the length before it, and its units in their order."""

    file: str
    header: bytes
    units: tuple[Unit, ...]

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(unit.bytes for unit in self.units)


def entry(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Entry:
    """The entry of a tensor that is written."""
    return Entry(name, NAMES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)


def shards(units: Sequence[Unit], size: int) -> tuple[Shard, ...]:
    """Fill files with units in their order, up to `size` bytes of tensors each (more for a unit that is larger)."""
    groups: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if groups[-1] and filled + unit.bytes > size:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += unit.bytes
    count = len(groups)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def index(files: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json` of several files."""
    placed = {entry.name: shard.file for shard in files for unit in shard.units for entry in unit.entries}
    total = sum(unit.bytes for shard in files for unit in shard.units)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _shard(file: str, units: Sequence[Unit]) -> Shard:
    """Units with wide numbers come first: torch maps a tensor only where its start is a multiple of its width."""
    ordered = sorted(units, key=lambda unit: -unit.alignment)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for unit in ordered:
        for one in unit.entries:
            header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [start, start + one.bytes]}
            start += one.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Shard(file, len(text).to_bytes(8, "little") + text, tuple(ordered))
