"""A tensor of the merged model before it is rounded: the base's numbers, and what the adapter does to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from peftkit.backbone.roundtrip import Format
from peftkit.backbone.simulated import Simulated
from peftkit.base.dense import Dense
from peftkit.deltas.delta import Delta, LowRank
from peftkit.deltas.merging.kept import Kept
from peftkit.deltas.merging.source import Source
from peftkit.deltas.merging.workspace import WORKSPACE
from peftkit.errors import DeltaError


class Unwritable(DeltaError):
    """Numbers that the output cannot hold: the same merge would meet them again, so nothing of it is kept."""


@dataclass(frozen=True)
class Weight:
    """One tensor: base and delta."""

    name: str
    dense: Dense
    delta: Delta | None = None
    simulate: Format | None = None
    """The quantized backbone whose weights the delta is added to."""
    transposed: bool = False
    """Whether the file holds a linear layer's weight as (in, out)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Once it is merged."""
        return self.delta.shape if self.delta else tuple(self.dense.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) that it is read as."""
        if self.delta:
            return self.delta.matrix
        if len(self.shape) < 2:
            return 1, math.prod(self.shape)
        return self.shape[0], math.prod(self.shape[1:])

    def source(self) -> Source:
        """The base's rows, dequantized where that is asked for."""
        dense = Simulated(self.dense, self.simulate, self.transposed) if self.simulate else self.dense
        return Source(self.name, dense, self.matrix)

    def prepared(self, source: Source) -> Delta | None:
        """The delta, ready for many pieces of rows."""
        return self.delta.prepared(source.rows) if self.delta else None

    def refuse(self, why: str) -> Unwritable:
        """The error for numbers that cannot be written."""
        return Unwritable(
            f"{self.name}: {why}",
            expected="numbers that the output can hold",
            hint="choose --dtype bfloat16 or float32; if the adapter itself holds NaN, train it again",
        )

    def changed(
        self, delta: Delta, source: Source, first: int, last: int, base: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ΔW, W + ΔW) of some rows in float64, given W; ΔW is W + ΔW − W where the adapter replaces the tensor.

        `base` may become W + ΔW; both are good until the next call in the same thread.
        """
        if isinstance(delta, LowRank):  # as prepared: contiguous float64 factors, scale 1
            change = WORKSPACE.take("change", base.shape)
            torch.mm(delta.left[first:last], delta.right, out=change)
            return change, base.add_(change)
        if delta.additive:
            change = delta.change(first, last, source.rows)
            return change, base.add_(change)
        merged = delta.merged(first, last, source.rows)
        return merged - base, merged


def squared(values: torch.Tensor) -> float:
    """The sum of squares."""
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def kept_of(weight: Weight, own: float, change: torch.Tensor, error: torch.Tensor, unchanged: int) -> Kept:
    """Sums over some rows in float64: `own` is ‖W‖², `error` is ΔŴ − ΔW. Raises DeltaError for NaN and infinity."""
    change, error = change.reshape(-1), error.reshape(-1)
    delta, lost, noise = (
        float(torch.dot(one, other)) for one, other in ((change, change), (error, change), (error, error))
    )
    found = Kept(change.numel(), unchanged, delta, own, lost, noise)
    if not found.finite:
        raise weight.refuse("base and delta give NaN or infinity")
    return found
