"""Reading the header of a safetensors file without a library, and saying what is wrong with it.

safetensors has no checksum; what can be checked without the manifest's digest is that the header is sound: it lies
within the file, and the tensors it names fill the rest exactly.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from peftkit.canonical import strict_json

LONGEST_HEADER = 100_000_000
"""The limit of the safetensors library itself."""

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def header_problems(path: Path) -> list[str]:
    """What is wrong with the header of a safetensors file; empty when it is sound."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            return [f"has {size} bytes, a safetensors file has at least 8"]
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, LONGEST_HEADER):
            return [f"says its header has {length} bytes, at most {min(size - 8, LONGEST_HEADER)} are possible"]
        data = stream.read(length)
    try:
        header = strict_json(data)
    except ValueError as error:
        return [f"has a header that is not JSON: {error}"]
    if not isinstance(header, dict):
        return ["has a header that is not a JSON object"]
    return _layout_problems(header, size - 8 - length)


def _layout_problems(header: dict[str, Any], room: int) -> list[str]:
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                problems.append("has metadata that is not text")
            continue
        problem = _entry_problem(entry)
        if problem:
            problems.append(f"has the tensor {name!r} {problem}")
        else:
            spans.append((*entry["data_offsets"], name))
    if problems:
        return problems
    reached = 0
    for first, end, name in sorted(spans):
        if first != reached:
            kind = "a hole" if first > reached else "an overlap"
            return [f"has {kind} before the tensor {name!r}: it starts at byte {first}, {reached} was expected"]
        reached = end
    if reached != room:
        return [f"has {room} bytes of tensors, the header names {reached}"]
    return []


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "without exactly dtype, shape and data_offsets"
    bits = _BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        return f"of unknown dtype {entry['dtype']!r}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return "with a shape or offsets that are not whole numbers"
    span = offsets[1] - offsets[0]
    needed = 0 if 0 in shape else bits
    for extent in shape:
        needed *= extent
        if needed > span * 8:  # stop early: a hostile shape would make a number of millions of digits
            break
    if needed != span * 8:
        return f"of {span} bytes, which is not what {entry['dtype']} of shape {str(shape)[:80]} needs"
    return None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
