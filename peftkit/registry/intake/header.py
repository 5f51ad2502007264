"""Reading the header of a safetensors file that is not trusted: every refusal names its rule."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from peftkit.canonical import strict_json
from peftkit.registry.intake.rules import LARGEST_HEADER, LONGEST_NAME, MOST_TENSORS, AdapterRefused, shown

WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""Bytes of one number; the dtypes that an adapter may have."""

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header: its dtype, shape and bytes, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int


def read_header(stream: BinaryIO, size: int) -> tuple[bytes, list[Tensor]]:
    """The raw first bytes of a file of `size` bytes, up to its tensors, and its tensors in the order of their bytes."""
    if size < 8:
        raise AdapterRefused("header.short", f"the weights have {size} bytes")
    lead = stream.read(8)
    (length,) = struct.unpack("<Q", lead)
    if length > LARGEST_HEADER:
        raise AdapterRefused("limit.header-bytes", f"the weights say that their header has {length} bytes")
    if length > size - 8:
        raise AdapterRefused("header.length", f"the header has {length} bytes, the file has {size - 8} after it")
    text = stream.read(length)
    return lead + text, _tensors(_parse(text), size - 8 - length)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = strict_json(text)
    except ValueError as error:
        rule = "header.duplicate-key" if "stands twice" in str(error) else "header.json"
        raise AdapterRefused(rule, f"the header of the weights: {shown(str(error))}") from error
    if not isinstance(header, dict):
        raise AdapterRefused("header.json", "the header of the weights is not a JSON object")
    return header


def _tensors(header: dict[str, Any], room: int) -> list[Tensor]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterRefused("header.metadata", "the metadata of the weights is not text")
    if len(header) > MOST_TENSORS:
        raise AdapterRefused("limit.tensors", f"the weights have {len(header)} tensors")
    check_names(list(header))
    tensors = sorted((_tensor(name, entry, room) for name, entry in header.items()), key=lambda t: (t.first, t.end))
    if not tensors:
        raise AdapterRefused("tensor.none", "the weights hold no tensor")
    reached = 0
    for tensor in tensors:
        if tensor.first != reached:
            rule = "header.hole" if tensor.first > reached else "header.overlap"
            fact = f"the tensor {shown(tensor.name)} starts at byte {tensor.first}, {reached} was expected"
            raise AdapterRefused(rule, fact)
        reached = tensor.end
    if reached != room:
        raise AdapterRefused("header.hole", f"{room - reached} bytes follow the last tensor")
    return tensors


def _tensor(name: str, entry: Any, room: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterRefused("header.entry", f"the tensor {shown(name)} has other fields")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        fact = f"the tensor {shown(name)} has dtype {shown(dtype)}"
        raise AdapterRefused("header.dtype", fact, expected=f"one of {', '.join(WIDTHS)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterRefused("header.entry", f"shape or offsets of the tensor {shown(name)} are not whole numbers")
    if offsets[1] > room:
        fact = f"the tensor {shown(name)} ends at byte {offsets[1]}, the file has {room} bytes of tensors"
        raise AdapterRefused("header.range", fact)
    if 0 in shape:
        hint = "a training with ZeRO-3 or FSDP saved shards: gather the parameters before save_pretrained"
        raise AdapterRefused("tensor.empty", f"the tensor {shown(name)} has shape {shown(shape)}", hint=hint)
    needed, span = WIDTHS[dtype], offsets[1] - offsets[0]
    for extent in shape:
        needed *= extent
        if needed > span:  # stop early: a hostile shape would make a number of millions of digits
            break
    if needed != span:
        fact = f"the tensor {shown(name)} has {span} bytes, {dtype} of shape {shown(shape)} needs another number"
        raise AdapterRefused("header.size", fact)
    return Tensor(name, dtype, tuple(shape), *offsets)


def check_names(names: list[str]) -> None:
    """Raise AdapterRefused unless all names are dotted words of printable ASCII that stay apart when case is lost."""
    seen: dict[str, str] = {}
    for name in names:
        if len(name) > LONGEST_NAME:
            raise AdapterRefused("limit.name", f"the tensor {shown(name)} has a name of {len(name)} characters")
        parts = name.split(".")
        if not all(part and all("!" <= letter <= "~" and letter not in "/\\" for letter in part) for part in parts):
            raise AdapterRefused("tensor.name", f"a tensor is named {shown(name)}")
        twin = seen.setdefault(name.lower(), name)
        if twin != name:
            raise AdapterRefused("tensor.look-alike", f"{shown(twin)} and {shown(name)} differ only in case")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
