"""Tensors as numbers, however they are stored: plain, or in bitsandbytes' 4-bit and int8 uploads.

What bitsandbytes would compute with is computed here in numpy, in pieces, so that neither torch nor a GPU is needed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from peftkit.base.raw import Array, Stored, rounded, tensors, weight_files
from peftkit.base.record import plain
from peftkit.canonical import strict_json
from peftkit.errors import BaseError

# bitsandbytes dequantizes with these tables and never with the `quant_map` of the file (functional.get_4bit_type).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_CODES = {
    "nf4": np.array(_NF4, dtype=np.float32),
    "fp4": np.array([*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)], dtype=np.float32) / np.float32(12),
}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LARGEST_STATE = 1 << 16


class Dense(Protocol):
    """A tensor that can be read as numbers, piece by piece, however it is stored."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def storage(self) -> str: ...

    def part(self, first: int = 0, last: int | None = None) -> Array: ...


@dataclass(frozen=True)
class FourBit:
    """A matrix that bitsandbytes stored in 4 bits, dequantized as its `dequantize_4bit` does.

    Two numbers share a byte, the first one in the upper half. Source: bitsandbytes 0.50, functional.py (QuantState).
    """

    packed: Stored
    shape: tuple[int, ...]
    dtype: str
    codes: Array
    absmax: Array
    blocksize: int
    storage: str = "bnb-4bit"

    def part(self, first: int = 0, last: int | None = None) -> Array:
        """Numbers `first` to `last` in row-major order, rounded to the dtype they were quantized from."""
        size = math.prod(self.shape)
        last = size if last is None else min(last, size)
        pairs = self.packed.raw(first // 2, (last + 1) // 2)
        nibbles = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
        block = first // self.blocksize
        scales = np.repeat(self.absmax[block : -(-last // self.blocksize)], self.blocksize)
        return rounded(self.codes[nibbles] * scales[first - block * self.blocksize :][: last - first], self.dtype)


@dataclass(frozen=True)
class EightBit:
    """A matrix that bitsandbytes stored as int8 with one scale per row (LLM.int8), dequantized to float32.

    Source: bitsandbytes 0.50, `int8_vectorwise_dequant`.
    """

    rows: Stored
    scales: Array
    dtype: str = "F32"
    storage: str = "bnb-8bit"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.rows.shape

    def part(self, first: int = 0, last: int | None = None) -> Array:
        """Numbers `first` to `last` in row-major order, float32."""
        found, columns = self.rows.part(first, last).astype(np.float32), self.shape[1]
        row = first // columns
        scales = np.repeat(self.scales[row : -(-(first + found.size) // columns)], columns)[first - row * columns :]
        dense: Array = found * scales[: found.size] * np.float32(1 / 127)
        return dense


def dense_tensors(folder: Path) -> dict[str, Dense]:
    """Every tensor of a base by name, quantized ones with their constants folded in; nothing but those is read yet.

    Raises BaseError for a file that is no whole safetensors, or constants that do not fit their weight.
    """
    stored = {
        name: Stored(path, name, dtype, shape, start, end)
        for path in weight_files(folder)
        for name, dtype, shape, start, end in tensors(path)
    }
    found: dict[str, Dense] = dict(stored)
    for name in stored:
        packed = re.fullmatch(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)", name, re.DOTALL)
        if packed and packed[1] in stored:
            weight, sides = packed[1], ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            _drop(found, [name, *(f"{weight}.{side}" for side in sides)])
            found[weight] = _four_bit(stored, weight, packed[2])
        module = name.removesuffix(".SCB")
        if module != name and f"{module}.weight" in stored:
            _drop(found, [name, f"{module}.weight_format"])
            found[f"{module}.weight"] = _eight_bit(stored, module)
    return found


def _drop(found: dict[str, Dense], names: list[str]) -> None:
    for name in names:
        found.pop(name, None)


def _four_bit(stored: dict[str, Stored], weight: str, quant_type: str) -> FourBit:
    """The 4-bit matrix `weight` with its constants. The state is JSON in a uint8 tensor: QuantState.as_dict."""
    state_tensor = stored[f"{weight}.quant_state.bitsandbytes__{quant_type}"]
    try:
        state = strict_json(state_tensor.raw(0, _LARGEST_STATE).tobytes())
        shape, blocksize, dtype = tuple(state["shape"]), state["blocksize"], _DTYPES[state["dtype"]]
        size = math.prod(shape)
        if not shape or not all(type(extent) is int and extent >= 0 for extent in shape):
            raise ValueError(f"its shape is {shape!r}")
        if type(blocksize) is not int or blocksize not in _BLOCKSIZES:
            raise ValueError(f"its blocksize is {blocksize!r}")
        absmax = _absmax(stored, weight, state)
        if absmax.size != -(-size // blocksize):
            raise ValueError(f"{absmax.size} scales for {size} numbers in blocks of {blocksize}")
        packed = stored[weight]
        if packed.end - packed.start != (size + 1) // 2:
            raise ValueError(f"{packed.end - packed.start} bytes for {size} numbers of 4 bits")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _unreadable(state_tensor, weight, error) from None
    return FourBit(packed, shape, dtype, _CODES[quant_type], absmax, blocksize)


def _absmax(stored: dict[str, Stored], weight: str, state: dict[str, Any]) -> Array:
    """One float32 scale per block; with double quantization they are int8 codes with scales of their own."""
    absmax = stored[f"{weight}.absmax"]
    if f"{weight}.nested_absmax" not in stored:
        return absmax.part().astype(np.float32)
    blocksize, offset = state["nested_blocksize"], np.float32(state["nested_offset"])
    if type(blocksize) is not int or blocksize < 1 or absmax.dtype != "U8":
        raise ValueError(f"{absmax.dtype} scales in blocks of {blocksize!r}")
    outer = stored[f"{weight}.nested_absmax"].part().astype(np.float32)
    codes = stored[f"{weight}.nested_quant_map"].part().astype(np.float32)
    inner = absmax.part()
    scales: Array = codes[inner] * outer[np.arange(inner.size) // blocksize] + offset
    return scales


def _eight_bit(stored: dict[str, Stored], module: str) -> EightBit:
    rows, scales, layout = stored[f"{module}.weight"], stored[f"{module}.SCB"], stored.get(f"{module}.weight_format")
    if rows.dtype != "I8" or len(rows.shape) != 2 or scales.size != rows.shape[0]:
        problem = f"{rows.dtype} of shape {list(rows.shape)} with {scales.size} scales"
        raise _unreadable(rows, rows.name, ValueError(problem))
    if layout is not None and layout.part().any():  # 1 to 3 are the tiled layouts of bitsandbytes before 0.45
        raise _unreadable(rows, rows.name, ValueError("it is tiled for one generation of GPUs"))
    return EightBit(rows, scales.part().astype(np.float32))


def _unreadable(stored: Stored, weight: str, error: Exception) -> BaseError:
    reason = plain(str(error) or type(error).__name__, 200)
    return BaseError(
        f"the quantized {plain(weight)} in {stored.path} cannot be read: {reason}",
        expected="an upload that bitsandbytes 0.43 or newer saved",
        hint="fetch the base again",
    )
