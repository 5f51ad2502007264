"""A linear layer's weight merged and quantized: a bitsandbytes upload's tensors, and what they keep of the delta."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peftkit.backbone.roundtrip import Codes, Format, Rounding, quantized, rows_at_once
from peftkit.deltas.delta import Delta
from peftkit.deltas.merging.kept import Kept, total
from peftkit.deltas.merging.layout import Entry, Unit, entry
from peftkit.deltas.merging.product import Job, Piece, Product
from peftkit.deltas.merging.source import Source
from peftkit.deltas.merging.weight import Weight, kept_of, squared
from peftkit.deltas.rounding import to_bytes
from peftkit.errors import BackboneError

_STATE = 512
"""Bytes kept for the JSON of a 4-bit weight's constants, filled up with spaces: its length depends on their values."""


@dataclass(frozen=True)
class Requantized(Product):
    """One job for the whole matrix, since double quantization needs all constants; memory is one byte per number."""

    weight: Weight
    form: Format
    rounding: Rounding
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), which is how bitsandbytes stores it."""
        rows, columns = self.weight.matrix
        return (columns, rows) if self.weight.transposed else (rows, columns)

    @property
    def unit(self) -> Unit:
        """The packed weight and its constants, wide numbers first; of 4 bits, in a multiple of eight bytes."""
        name, (height, width) = self.weight.name, self.shape
        module = name.removesuffix("weight")
        if self.form.code == "int8":
            return Unit((entry(f"{module}SCB", torch.float32, (height,)), entry(name, torch.int8, (height, width))))
        size = height * width
        blocks = -(-size // 64)
        found = [entry(f"{name}.quant_map", torch.float32, (16,))]
        if self.form.double_quant:
            found += [entry(f"{name}.nested_absmax", torch.float32, (-(-blocks // 256),))]
            found += [entry(f"{name}.nested_quant_map", torch.float32, (256,))]
        found += [entry(f"{name}.absmax", torch.uint8 if self.form.double_quant else torch.float32, (blocks,))]
        found += [entry(name, torch.uint8, ((size + 1) // 2, 1))]
        state = _STATE + _filled(sum(one.bytes for one in found)) - 1
        return Unit((*found, entry(f"{name}.quant_state.bitsandbytes__{self.form.code}", torch.uint8, (state,))))

    def jobs(self) -> Iterator[Job]:
        """One."""
        yield self._whole

    def _whole(self) -> Piece:
        source = self.weight.source()
        delta = self.weight.prepared(source)
        after = self._codes(_Rows(self.weight, source, delta))
        data = [_stored(after, one, self.weight.name) for one in self.unit.entries]
        if delta is None:
            return Piece(data)
        return Piece(data, self._kept(source, delta, after))

    def _codes(self, rows: _Rows) -> Codes:
        seed = f"{self.seed}|{self.weight.name}"
        try:
            return quantized(
                rows if not self.weight.transposed else rows.turned(), self.shape, self.form, self.rounding, seed
            )
        except BackboneError as error:
            raise self.weight.refuse(error.fact) from None

    def _kept(self, source: Source, delta: Delta, after: Codes) -> Kept:
        """ΔŴ is what the layer computes with, less what it would compute with for the base alone, drawn alike."""
        before = self._codes(_Rows(self.weight, source, None))
        rows, turned = self.weight.matrix[0], self.weight.transposed
        step = rows if turned else rows_at_once(self.weight.matrix[1])
        parts = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            base = source.rows(first, last)
            own = squared(base)
            change, _ = self.weight.changed(delta, source, first, last, base)
            one, other = (codes.rows(*((0, self.shape[0]) if turned else (first, last))) for codes in (after, before))
            unchanged = int(torch.count_nonzero(one == other))
            shift = (one.double() - other.double()).T if turned else one.double() - other.double()
            parts.append(kept_of(self.weight, own, change, shift - change, unchanged))
        return total(parts)


@dataclass(frozen=True)
class RowMajor(Product):
    """The mark of an int8 weight that its codes lie row by row, which bitsandbytes asks for."""

    module: str

    @property
    def unit(self) -> Unit:
        """One byte."""
        return Unit((entry(f"{self.module}.weight_format", torch.uint8, ()),))

    def jobs(self) -> Iterator[Job]:
        """One."""
        yield lambda: Piece([memoryview(b"\0")])


@dataclass(frozen=True)
class _Rows:
    """Rows of the merged matrix as float32, rounded once; without a delta, of the base."""

    weight: Weight
    source: Source
    delta: Delta | None

    def __call__(self, first: int, last: int) -> torch.Tensor:
        base = self.source.rows(first, last)
        merged = base if self.delta is None else self.weight.changed(self.delta, self.source, first, last, base)[1]
        found = merged.to(torch.float32)
        if not bool(torch.isfinite(found).all()):
            raise self.weight.refuse("base and delta give NaN or infinity")
        return found

    def turned(self) -> _Turned:
        """Of the transposed matrix."""
        return _Turned(self(0, self.weight.matrix[0]).T)


@dataclass(frozen=True)
class _Turned:
    matrix: torch.Tensor

    def __call__(self, first: int, last: int) -> torch.Tensor:
        return self.matrix[first:last]


def _stored(codes: Codes, one: Entry, name: str) -> memoryview:
    """The bytes of one entry; the constants' JSON is filled up to its length."""
    found = codes.stored()[one.name.removeprefix(name.removesuffix("weight"))]
    data = to_bytes(found.contiguous().reshape(-1))
    return memoryview(bytes(data).ljust(one.bytes)) if "quant_state" in one.name else data


def _filled(size: int) -> int:
    """A number of bytes from 1 to 8 that makes `size` a multiple of eight."""
    return math.ceil((size + 1) / 8) * 8 - size
