"""float64 rounded once to float32, bfloat16 or float16: to the nearest, ties to even (IEEE 754, section 4.3.1).

torch and numpy reach the 16-bit formats by way of float32, which rounds twice: 1 + 2⁻⁸ + 2⁻⁴⁰ becomes the float32
1 + 2⁻⁸, which lies half-way between two bfloat16 numbers and goes to the even one, although the other is nearer.
"""

from __future__ import annotations

import numpy as np
import torch

_LOW = (1 << 29) - 1
"""The bits of a float64's fraction that float32 has no room for."""


def round_once(values: torch.Tensor, dtype: torch.dtype, single: torch.Tensor | None = None) -> torch.Tensor:
    """Finite float64 numbers on the CPU as the nearest ones of `dtype`, ties to even, in a new tensor.

    `single` is a float32 tensor of the same shape to work in. Raises OverflowError when a number is too large for
    `dtype`, or was not finite before; ValueError for a dtype that is none of float64, float32, bfloat16 and float16.
    """
    if dtype == torch.bfloat16:
        found = _bfloat16(values, torch.empty_like(values, dtype=torch.float32) if single is None else single)
    elif dtype == torch.float16:
        found = _odd(values).to(torch.float32).to(torch.float16)
    elif dtype in (torch.float32, torch.float64):
        found = values.to(dtype, copy=True)
    else:
        raise ValueError(f"numbers cannot be rounded to {dtype}")
    lost = not_finite(found)
    if lost:
        raise OverflowError(f"{lost} of {values.numel()} numbers are not finite in {str(dtype).removeprefix('torch.')}")
    return found


def to_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as safetensors stores them, without a copy."""
    return memoryview(values.view(torch.uint8).reshape(-1).numpy())


def not_finite(values: torch.Tensor) -> int:
    """How many numbers are NaN or infinite."""
    if values.dtype == torch.bfloat16:  # torch.isfinite needs several times as long for 16 bits
        bits = values.reshape(-1).view(torch.int16).numpy()
        return int(np.count_nonzero((bits & 0x7F80) == 0x7F80))
    if values.dtype == torch.float16:
        return int(values.numel() - np.count_nonzero(np.isfinite(values.numpy())))
    return int(values.numel() - torch.count_nonzero(torch.isfinite(values)))


def _bfloat16(values: torch.Tensor, single: torch.Tensor) -> torch.Tensor:
    """By way of float32, moved off the middle between two bfloat16 numbers where it fell on one that `values` is not.

    Rounding never swaps two numbers, so elsewhere both are on the same side of every middle: all middles are float32
    numbers, whose lower half is 0x8000, among the subnormal ones too. The next float32 number has the next bits.
    """
    near = single.copy_(values).numpy().reshape(-1)
    bits = near.view(np.int32)
    middle = np.flatnonzero(bits << 16 == -1 << 31)  # three times as fast as a look at every second uint16
    if middle.size:
        true, tie = np.abs(values.reshape(-1).numpy()[middle]), np.abs(near[middle])
        bits[middle] += (true > tie).astype(np.int32) - (true < tie)
    return single.to(torch.bfloat16)


def _odd(values: torch.Tensor) -> torch.Tensor:
    """float64 cut to 24 bits, the last of them set where anything was cut off (round to odd).

    Rounding that to a format with at most 22 bits is rounding the number itself: Boldo and Melquiond, "Emulation of FMA
    and correctly rounded sums", IEEE Trans. Computers 57 (2008), theorem 1.
    """
    bits = values.contiguous().view(torch.int64)
    cut = (bits & _LOW).add_(_LOW)  # carries into bit 29 unless all below were zero
    return cut.bitwise_or_(bits).bitwise_and_(~_LOW).view(torch.float64)
