"""A GGUF file written as one step: tensors stream into a file beside the target, which is fsynced and renamed."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import gguf
import numpy as np

from peftkit.base.raw import Array, rounded
from peftkit.durable import sync_folder
from peftkit.errors import DeltaError
from peftkit.events import Phase, Progress, Report, silent

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_Q8_0_BLOCK = 32


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; its numbers are asked for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    """As numpy has it; GGUF lists extents the other way round."""
    dtype: Dtype
    blocks: Callable[[], Iterable[Array]]
    """Its rows in order, a few at a time, as float32 or float64 of shape (rows, columns)."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[_TYPES[self.dtype]]
        return math.prod(self.shape) // int(block) * int(size)


@dataclass(frozen=True)
class Written:
    """A GGUF file on disk."""

    path: Path
    arch: str
    tensors: int
    size: int
    """Bytes."""
    notes: tuple[str, ...] = ()
    """What the reader of the file should know."""


def storable(shape: tuple[int, ...], dtype: Dtype) -> Dtype:
    """The type that a tensor of this shape is stored in: vectors stay float32, as llama.cpp needs them.

    Rows that do not fill blocks of 32 are stored as f16 in a q8_0 file, as llama.cpp's quantizer does.
    """
    if len(shape) < 2:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _Q8_0_BLOCK else dtype


def encoded(name: str, values: Array, dtype: Dtype) -> bytes:
    """Numbers as bytes of `dtype`, rounded once to the nearest. Raises DeltaError for a number that does not fit."""
    if dtype == "f32":
        found = rounded(values, "F32")
    elif dtype == "f16":
        found = rounded(values, "F16")
    elif dtype == "bf16":
        found = rounded(values, "BF16")
    else:
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        raise DeltaError(
            f"{name} holds a number that {dtype} cannot hold: the largest is {np.abs(values).max():.3g}",
            expected="finite numbers within the range of the type",
            hint="export with dtype bf16 or f32",
        )
    if dtype == "bf16":
        return (found.view(np.uint32) >> 16).astype("<u2").tobytes()
    if dtype == "q8_0":
        return bytes(gguf.quantize(found, gguf.GGMLQuantizationType.Q8_0).tobytes())
    return bytes(found.tobytes())


def check_dtype(dtype: str) -> None:
    """Raise DeltaError for a type that no file is written in."""
    if dtype not in get_args(Dtype):
        raise DeltaError(f"a GGUF file of type {dtype!r} cannot be written", expected=", ".join(get_args(Dtype)))


def check_new(out: Path) -> None:
    """Raise DeltaError when `out` exists or its folder does not."""
    if out.exists() or out.is_symlink():
        raise DeltaError(f"{out} exists", expected="a new file", hint=f"remove it or choose another name: rm {out}")
    if not out.parent.is_dir():
        raise DeltaError(f"{out.parent} is no folder", hint=f"mkdir -p {out.parent}")


def write(
    out: Path,
    arch: str,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: Iterable[Tensor],
    *,
    notes: tuple[str, ...] = (),
    report: Report = silent,
) -> Written:
    """Write a GGUF file: `describe` adds the metadata, tensors are streamed in their order.

    Memory: one block of one tensor. Raises DeltaError when `out` exists or a number does not fit its type; then nothing
    is left behind.
    """
    check_new(out)
    listed = list(tensors)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}.new")
    writer = gguf.GGUFWriter(draft, arch)
    try:
        describe(writer)
        for tensor in listed:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("<f4"), tensor.nbytes, _TYPES[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        report(Phase("gguf", len(listed), "tensors"))
        for done, tensor in enumerate(listed, start=1):
            writer.write_tensor_data(_Stream(tensor))
            report(Progress(done, {}))
        writer.close()
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        check_new(out)
        os.replace(draft, out)
    except BaseException:
        writer.close()
        draft.unlink(missing_ok=True)
        raise
    sync_folder(out.parent)
    return Written(out, arch, len(listed), out.stat().st_size, notes)


class _Stream:
    """What GGUFWriter.write_tensor_data asks of an array, its size and its way into a file, without the array."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.nbytes = tensor.nbytes

    def tofile(self, file: BinaryIO) -> None:
        written = sum(file.write(piece) for piece in self._pieces())
        if written != self.nbytes:
            raise DeltaError(f"{self._tensor.name} has {written} bytes", expected=f"{self.nbytes} bytes")

    def _pieces(self) -> Iterator[bytes]:
        for block in self._tensor.blocks():
            yield encoded(self._tensor.name, block, self._tensor.dtype)


def copied(reader: Any, writer: gguf.GGUFWriter, leave_out: frozenset[str]) -> None:
    """Copy every metadata entry of a GGUF file but those named, with their types."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in leave_out:
            continue
        kind = field.types[0]
        value = field.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, value, kind, field.types[1])
        else:
            writer.add_key_value(key, value, kind)
