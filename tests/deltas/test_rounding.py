"""Rounding once, against integer arithmetic on exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.deltas.rounding import not_finite, round_once, to_bytes

FORMATS = {torch.float32: (24, -126, 127), torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15)}
"""Bits of the significand, smallest and largest exponent of normal numbers (IEEE 754; bfloat16 cuts float32)."""
DTYPES = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def exact(value: float, dtype: torch.dtype) -> Fraction | None:
    """The nearest number of the format, ties to the even significand; None beyond the largest."""
    bits, smallest, largest = FORMATS[dtype]
    if value == 0:
        return Fraction(0)
    step = Fraction(2) ** (max(math.frexp(value)[1] - 1, smallest) - bits + 1)
    count = Fraction(abs(value)) / step
    whole, rest = divmod(count.numerator, count.denominator)
    half = Fraction(rest, count.denominator)
    whole += half > Fraction(1, 2) or (half == Fraction(1, 2) and whole % 2 == 1)
    found = whole * step
    return None if found >= Fraction(2) ** (largest + 1) else found * (1 if value > 0 else -1)


def near_middles(dtype: torch.dtype) -> list[float]:
    """Middles between neighbours, subnormal and largest ones too, and what lies beside them by some float64 steps."""
    bits, smallest, largest = FORMATS[dtype]
    generator = np.random.default_rng(0)
    found: list[float] = []
    for exponent in (*range(smallest - bits - 3, smallest + 3), -3, 0, 5, largest - 1, largest):
        for _ in range(10):
            if exponent >= smallest:
                odd = 2 * int(generator.integers(2 ** (bits - 1), 2**bits)) + 1
                middle = math.ldexp(odd, exponent - bits)
            else:
                odd = 2 * int(generator.integers(0, 2 ** max(1, exponent - smallest + bits))) + 1
                middle = math.ldexp(odd, smallest - bits)
            for shift in (0, 1, -1, 3, 2**20, -(2**20), 2**28, 2**29 + 1):
                value = (np.array([middle]).view(np.int64) + shift).view(np.float64)[0]
                found.append(float(value) * (1 if generator.random() < 0.5 else -1))
    return [value for value in found if exact(value, dtype) is not None]


@DTYPES
def test_ties_neighbours_and_subnormals_are_rounded_exactly(dtype: torch.dtype) -> None:
    values = near_middles(dtype)
    assert len(values) > 1200
    assert any(0 < abs(value) < 2.0 ** FORMATS[dtype][1] for value in values)
    found = round_once(torch.tensor(values, dtype=torch.float64), dtype).double().tolist()
    assert [Fraction(value) for value in found] == [exact(value, dtype) for value in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_contract_torch_rounds_twice(dtype: torch.dtype) -> None:
    """Why this module exists: of the values above, more than a third come out wrong by way of float32."""
    values = [value for value in near_middles(dtype) if abs(value) < 2.0 ** FORMATS[dtype][2]]
    twice = torch.tensor(values, dtype=torch.float64).to(torch.float32).to(dtype).double().tolist()
    wrong = sum(Fraction(found) != exact(value, dtype) for found, value in zip(twice, values, strict=True))
    assert wrong > len(values) / 3


@DTYPES
@settings(max_examples=100, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_any_float64(dtype: torch.dtype, value: float) -> None:
    expected = exact(value, dtype)
    if expected is None:
        with pytest.raises(OverflowError, match="1 of 1 numbers"):
            round_once(torch.tensor([value], dtype=torch.float64), dtype)
        return
    found = round_once(torch.tensor([value], dtype=torch.float64), dtype)
    assert Fraction(found.double().item()) == expected
    assert math.copysign(1, found.double().item()) == math.copysign(1, value)


@DTYPES
def test_the_largest_number_and_what_is_beyond(dtype: torch.dtype) -> None:
    bits, _, largest = FORMATS[dtype]
    limit = math.ldexp(2 - 2.0**-bits, largest)  # half a step above the largest number
    below = math.nextafter(limit, 0)
    assert round_once(torch.tensor([below], dtype=torch.float64), dtype).double().item() == torch.finfo(dtype).max
    for value in (limit, -limit, 1e300, math.inf, math.nan):
        with pytest.raises(OverflowError, match=str(dtype).removeprefix("torch.")):
            round_once(torch.tensor([1.0, value], dtype=torch.float64), dtype)


@DTYPES
def test_the_input_stays_as_it_is(dtype: torch.dtype) -> None:
    values = torch.tensor(near_middles(dtype), dtype=torch.float64)
    before = values.clone()
    round_once(values, dtype)
    assert torch.equal(values, before)


def test_a_transposed_matrix_keeps_its_order() -> None:
    values = (torch.arange(12, dtype=torch.float64).reshape(3, 4) + 1 + 2.0**-8).T
    for dtype in FORMATS:
        assert torch.equal(round_once(values, dtype), round_once(values.contiguous(), dtype))


def test_bytes_are_little_endian_in_row_order() -> None:
    assert bytes(to_bytes(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16))) == b"\x80\x3f\x00\xc0"


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64], ids=str)
def test_counts_what_is_not_finite(dtype: torch.dtype) -> None:
    assert not_finite(torch.tensor([1.0, math.inf, -math.inf, math.nan, 0.0], dtype=dtype)) == 3


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        round_once(torch.zeros(1, dtype=torch.float64), torch.int8)
