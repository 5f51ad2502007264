"""Matrices to bitsandbytes' 4-bit and int8 formats and back, some rows at a time: the numbers of a quantized layer.

The formats quantize blocks of 64 numbers (nf4, fp4) or rows (int8), so a matrix of any size goes through in pieces;
only double quantization looks at all block constants at once, and those are 1/16 of a byte per number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from peftkit.backbone.bnb import functional as bnb
from peftkit.backbone.quantize import BLOCK, check_width
from peftkit.errors import BackboneError

Code = Literal["nf4", "fp4", "int8"]
Rounding = Literal["nearest", "stochastic"]
Rows = Callable[[int, int], torch.Tensor]
"""Rows `first` to `last` (excluded) of a matrix, on the CPU."""

STEP = 1 << 17
"""Numbers that are quantized at once; more would fall out of a core's cache."""


@dataclass(frozen=True)
class Format:
    """How a matrix of shape (out, in) is quantized."""

    code: Code
    double_quant: bool = False
    """nf4 and fp4: whether the blocks' constants are held in 8 bits."""
    dtype: torch.dtype = torch.float32
    """nf4 and fp4 dequantize to it."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Format | None:
        """What a manifest's `base.quantization` says; None where nothing was quantized. Raises BackboneError."""
        bits = record.get("bits")
        if bits not in (4, 8):
            return None
        dtype = getattr(torch, str(record.get("dtype") or record.get("compute_dtype") or "float32"), None)
        code = "int8" if bits == 8 else str(record.get("quant_type", ""))
        if code not in ("nf4", "fp4", "int8") or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BackboneError(f"the quantization {dict(record)!r} is not known", expected="nf4, fp4 or int8")
        return cls(code, bool(record.get("double_quant", False)), dtype)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FourBitCodes:
    """A matrix in 4 bits: `packed` is uint8 of shape (n, 1) in whole blocks, `scales` one float32 per block of 64."""

    packed: torch.Tensor
    state: Any
    scales: torch.Tensor

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Dequantized rows in the state's dtype, as `dequantize_4bit` of the whole matrix has them."""
        columns = self.state.shape[1]
        start, end = first * columns, last * columns
        low, high = start // BLOCK, -(-end // BLOCK)
        state = bnb.QuantState(
            absmax=self.scales[low:high],
            # Whole blocks as rows: pieces of a width that bitsandbytes dequantizes rightly.
            shape=torch.Size([high - low, BLOCK]),
            code=self.state.code,
            blocksize=BLOCK,
            quant_type=self.state.quant_type,
            dtype=self.state.dtype,
        )
        packed = self.packed.view(-1)[low * BLOCK // 2 : high * BLOCK // 2].view(-1, 1)
        found = bnb.dequantize_4bit(packed, state).view(-1)
        return found[start - low * BLOCK : end - low * BLOCK].view(last - first, columns)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of an upload, by what follows the module's name in theirs."""
        weight = self.packed[: (self.state.shape.numel() + 1) // 2]
        return {"weight": weight} | {f"weight.{side}": value for side, value in self.state.as_dict(packed=True).items()}


@dataclass(frozen=True)
class Int8Codes:
    """A matrix as int8 with one float32 per row (LLM.int8, arXiv 2208.07339, section 2)."""

    codes: torch.Tensor
    scales: torch.Tensor

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Dequantized rows in float32."""
        return self.codes[first:last].to(torch.float32) * (self.scales[first:last].unsqueeze(1) / 127.0)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of an upload, by what follows the module's name in theirs."""
        return {"SCB": self.scales, "weight": self.codes, "weight_format": torch.tensor(0, dtype=torch.uint8)}


Codes = FourBitCodes | Int8Codes


def rows_at_once(columns: int) -> int:
    """How many rows are quantized at once: whole blocks, and the same on every machine."""
    whole = BLOCK // math.gcd(BLOCK, columns)
    return max(STEP // columns // whole, 1) * whole


def quantized(
    rows: Rows, shape: tuple[int, int], form: Format, rounding: Rounding = "nearest", seed: str = ""
) -> Codes:
    """Quantize a matrix of shape (out, in) that is given by rows of finite floats.

    `nearest` gives the bits of `quantize_4bit` and `Int8Params`; `stochastic` rounds each number up with the
    probability that makes its expectation the number itself, seeded by `seed` and the row. Double quantization takes
    the mean of all constants, whose last bit depends on the number of threads: here it is one. Raises BackboneError
    for widths that bitsandbytes gets wrong on a CPU, and for int8 of numbers beyond float16.
    """
    if form.code != "int8":
        check_width(shape[1], "cpu")
    step = rows_at_once(shape[1])
    spans = [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
    if form.code == "int8":
        return _int8(rows, shape, spans, rounding, seed)
    size = shape[0] * shape[1]
    blocks = -(-size // BLOCK)
    packed = torch.zeros((blocks * BLOCK // 2, 1), dtype=torch.uint8)  # whole blocks, so that pieces are alike
    scales = torch.empty(blocks, dtype=torch.float32)
    state: Any = None
    for first, last in spans:
        given = rows(first, last).contiguous()
        codes, state = bnb.quantize_4bit(given, blocksize=BLOCK, quant_type=form.code)
        if rounding == "stochastic":
            codes = _stochastic_codes(given, state, _generator(seed, first))
        start = first * shape[1]
        packed[start // 2 : start // 2 + codes.numel()] = codes
        scales[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    return _four_bit(packed, scales, torch.Size(shape), form, state.code)


def _four_bit(
    packed: torch.Tensor, scales: torch.Tensor, shape: torch.Size, form: Format, code: torch.Tensor
) -> FourBitCodes:
    """The constants as `quantize_4bit` with `compress_statistics` leaves them (bitsandbytes 0.50, functional.py)."""
    fixed = {"shape": shape, "code": code, "blocksize": BLOCK, "quant_type": form.code, "dtype": form.dtype}
    if not form.double_quant:
        return FourBitCodes(packed, bnb.QuantState(absmax=scales, **fixed), scales)
    offset = scales.mean()
    inner, outer = bnb.quantize_blockwise(scales - offset, blocksize=256)
    state = bnb.QuantState(absmax=inner, offset=offset, state2=outer, **fixed)
    return FourBitCodes(packed, state, bnb.dequantize_blockwise(inner, outer).add_(offset).float())


def _stochastic_codes(given: torch.Tensor, state: Any, generator: torch.Generator) -> torch.Tensor:
    """Codes of `given`, packed: each number goes to one of the two levels around it."""
    levels, order = state.code.double().sort(stable=True)
    scales = state.absmax.double().repeat_interleave(BLOCK)[: given.numel()]
    scaled = torch.where(scales > 0, given.reshape(-1).double() / scales, 0.0).clamp_(-1, 1)
    upper = torch.searchsorted(levels, scaled).clamp_(1, levels.numel() - 1)
    low, high = levels[upper - 1], levels[upper]
    share = torch.where(high > low, (scaled - low) / (high - low), 1.0)
    draw = torch.rand(scaled.shape, generator=generator, dtype=torch.float64)
    codes = order[torch.where(draw < share, upper, upper - 1)].to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)


def _int8(rows: Rows, shape: tuple[int, int], spans: list[tuple[int, int]], rounding: Rounding, seed: str) -> Int8Codes:
    codes, scales = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.float32)
    for first, last in spans:
        given = rows(first, last).contiguous()
        half = given.to(torch.float16)  # as Int8Params does
        if not bool(torch.isfinite(half).all()):
            raise BackboneError("a weight is beyond ±65504, and int8 goes by way of float16", expected="nf4 or fp4")
        codes[first:last], scales[first:last], _ = bnb.int8_vectorwise_quant(half)
        if rounding == "stochastic":
            wide = scales[first:last].double().unsqueeze(1)
            scaled = torch.where(wide > 0, given.double() * 127 / wide, 0.0)
            draw = torch.rand(scaled.shape, generator=_generator(seed, first), dtype=torch.float64)
            codes[first:last] = (scaled + draw).floor_().clamp_(-127, 127).to(torch.int8)
    return Int8Codes(codes, scales)


def _generator(seed: str, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}|{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
