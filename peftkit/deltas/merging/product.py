"""How the tensors of a merged model are made: copied, rounded once from float64, or quantized.

Work is cut into pieces by the shape of a tensor alone, so the bytes do not depend on files, threads or interruptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from peftkit.base.raw import Array, Stored
from peftkit.deltas.delta import Delta
from peftkit.deltas.merging.kept import Kept
from peftkit.deltas.merging.layout import Entry, Unit, entry
from peftkit.deltas.merging.source import Source
from peftkit.deltas.merging.weight import Weight, kept_of, squared
from peftkit.deltas.merging.workspace import WORKSPACE
from peftkit.deltas.rounding import round_once, to_bytes

STEP = 1 << 16
"""Numbers that are computed at once: their float64 buffers stay in a core's cache. BLAS's last bit depends on it."""
STEPS = 16
"""Steps of one job: to read, hand over and wait for a job costs 0.1 ms besides its bytes, a step 0.35 ms."""
COPIED = 1 << 22
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class Piece:
    """The next bytes of a unit, and what they keep of the delta."""

    data: Sequence[memoryview]
    kept: Kept | None = None


Job = Callable[[], Piece]


class Product(ABC):
    """One unit of the merged model and the work that makes it."""

    @property
    @abstractmethod
    def unit(self) -> Unit:
        """Names, dtypes and shapes, before anything is computed."""

    @abstractmethod
    def jobs(self) -> Iterator[Job]:
        """Pieces of work in the order of their bytes; each can run in any thread."""


@dataclass(frozen=True)
class Copied(Product):
    """A tensor whose bytes are the base's."""

    stored: Stored
    name: str
    """What it is called in the merged model."""

    @property
    def unit(self) -> Unit:
        """The base's own entry."""
        stored = self.stored
        return Unit((Entry(self.name, stored.dtype, stored.shape, stored.end - stored.start),))

    def jobs(self) -> Iterator[Job]:
        """A few MB at a time."""
        size = self.stored.end - self.stored.start
        for first in range(0, size, COPIED):
            yield partial(self._piece, first, min(first + COPIED, size))

    def _piece(self, first: int, last: int) -> Piece:
        return Piece([self.stored.raw(first, last).data])


@dataclass(frozen=True)
class Given(Product):
    """A tensor that the adapter brings and the base's files do not hold: of a task's head."""

    name: str
    values: torch.Tensor
    dtype: torch.dtype

    @property
    def unit(self) -> Unit:
        """One tensor."""
        return Unit((entry(self.name, self.dtype, tuple(self.values.shape)),))

    def jobs(self) -> Iterator[Job]:
        """All of it: a head is small."""
        yield self._piece

    def _piece(self) -> Piece:
        found = round_once(self.values.detach().double().reshape(-1), self.dtype)
        return Piece([to_bytes(found)])


@dataclass(frozen=True)
class Rounded(Product):
    """A tensor that is computed in float64 and rounded once."""

    weight: Weight
    dtype: torch.dtype

    @property
    def unit(self) -> Unit:
        """One tensor."""
        return Unit((entry(self.weight.name, self.dtype, self.weight.shape),))

    def jobs(self) -> Iterator[Job]:
        """Some rows at a time."""
        source = self.weight.source()
        delta = self.weight.prepared(source)
        rows, columns = self.weight.matrix
        step = max(STEP // max(columns, 1), 1)
        for first in range(0, rows, STEPS * step):
            yield partial(self._piece, delta, source, step, first, min(first + STEPS * step, rows))

    def _piece(self, delta: Delta | None, source: Source, step: int, first: int, last: int) -> Piece:
        stored = source.stored(first, last, "stored")
        data, kept = [], Kept()
        for top in range(first, last, step):
            end = min(top + step, last)
            try:
                found, part = self._rounded(stored[top - first : end - first], delta, source, top, end)
            except OverflowError as lost:
                raise self.weight.refuse(str(lost)) from None
            data.append(to_bytes(found))
            kept += part
        return Piece(data, kept if delta else None)

    def _rounded(
        self, stored: torch.Tensor, delta: Delta | None, source: Source, first: int, last: int
    ) -> tuple[torch.Tensor, Kept]:
        """(Merged rows, what they keep), given the rows as they are stored."""
        base = WORKSPACE.take("base", stored.shape).copy_(stored)
        single = WORKSPACE.take("single", stored.shape, torch.float32)
        if delta is None:
            return round_once(base, self.dtype, single), Kept()
        alone = stored if stored.dtype == self.dtype else round_once(base, self.dtype, single)
        own = squared(base)
        change, merged = self.weight.changed(delta, source, first, last, base)
        found = round_once(merged, self.dtype, single)
        unchanged = int(np.count_nonzero(_bits(found) == _bits(alone)))
        error = WORKSPACE.take("error", stored.shape).copy_(found).sub_(merged)
        return found, kept_of(self.weight, own, change, error, unchanged)


def _bits(values: torch.Tensor) -> Array:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits: Array = values.view(width).numpy()
    return bits
