"""Tensors straight from safetensors files: the header, the bytes in pieces, and the numbers as numpy has them.

numpy has no bfloat16: its 16 bits are the upper half of a float32, so it is widened on reading and rounded on writing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftkit.canonical import strict_json
from peftkit.errors import BaseError

Array = NDArray[Any]
CHUNK = 1 << 22
"""Bytes read at once."""
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NUMPY |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base, in name order. Raises BaseError when there are none (pickles are refused)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed(index)
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if files:
        return files
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise BaseError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened",
            expected="weights as safetensors",
            hint="convert them in a sandbox with transformers: save_pretrained(..., safe_serialization=True)",
        )
    raise BaseError(f"{folder} holds no weights", expected="at least one .safetensors file")


def _indexed(index: Path) -> list[Path]:
    """The files that the index names and transformers loads; nothing outside the folder."""
    names = sorted({str(name) for name in dict(json_file(index).get("weight_map") or {}).values()})
    outside = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if outside or missing or not names:
        raise BaseError(
            f"{index} names {(outside or missing or ['no file'])[0]}, which is not in this folder",
            expected="safetensors files beside the index",
            hint="fetch the base again",
        )
    return [index.parent / name for name in names]


def json_file(path: Path) -> dict[str, Any]:
    """The object of a JSON file, empty when there is no file. Raises BaseError when it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"{path} cannot be read: {error}", expected="a JSON file") from None
    return content if isinstance(content, dict) else {}


def tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yield (name, dtype, shape, start, end) of every tensor of a safetensors file; start and end are file offsets.

    Raises BaseError when the header is malformed (format: https://github.com/huggingface/safetensors#format).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = strict_json(file.read(length)) if length <= min(size, LONGEST_HEADER) else None
            entries = {name: info for name, info in header.items() if name != "__metadata__"}  # type: ignore[union-attr]
            for name in sorted(entries):
                info = entries[name]
                start, end = (int(offset) + 8 + length for offset in info["data_offsets"])
                if not 8 + length <= start <= end <= size:
                    raise ValueError(f"tensor {name!r} lies outside the file")
                shape = tuple(info["shape"])
                if not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in shape):
                    raise ValueError(f"tensor {name!r} has the shape {info['shape']!r}")
                yield name, str(info["dtype"]), shape, start, end
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BaseError(f"{path} is not a whole safetensors file: {error}", hint="fetch it again") from None


def pieces(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end` of a file, a few MB at a time. Raises BaseError when the file ends before."""
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(CHUNK, end - start))
            if not piece:
                raise BaseError(f"{path} became shorter while it was read", hint="fetch it again")
            start += len(piece)
            yield piece


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file; nothing of it is in memory."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    storage: str = "plain"

    @property
    def size(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    def raw(self, first: int = 0, last: int | None = None) -> Array:
        """Bytes `first` to `last` of the tensor, uint8."""
        last = self.end - self.start if last is None else last
        content = b"".join(pieces(self.path, self.start + first, min(self.start + last, self.end)))
        return np.frombuffer(content, dtype=np.uint8)

    def part(self, first: int = 0, last: int | None = None) -> Array:
        """Numbers `first` to `last` in row-major order, 1-D; bfloat16 comes as float32.

        Raises BaseError for a dtype that numpy lacks, or a length that is not what the shape needs.
        """
        layout = np.dtype(_NUMPY.get(self.dtype, "V1"))
        if self.dtype not in _NUMPY or self.size * layout.itemsize != self.end - self.start:
            raise BaseError(
                f"{self.name!r} in {self.path} has {self.end - self.start} bytes of {self.dtype!r}"
                f" for the shape {list(self.shape)}",
                expected="one of " + ", ".join(_NUMPY) + ", and as many bytes as the shape needs",
            )
        last = self.size if last is None else min(last, self.size)
        found = self.raw(first * layout.itemsize, last * layout.itemsize).view(layout)
        return widen(found) if self.dtype == "BF16" else found


def widen(bits: Array) -> Array:
    """bfloat16 bit patterns (uint16) as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """`values` as a tensor of `dtype` would hold them: to the nearest, ties to even; bfloat16 comes back as float32.

    Raises BaseError for a dtype that is none of F64, F32, F16 and BF16.
    """
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise BaseError(f"numbers cannot be rounded to {dtype!r}", expected="F64, F32, F16 or BF16")
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(_NUMPY[dtype])
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), single, widen(nearest))
