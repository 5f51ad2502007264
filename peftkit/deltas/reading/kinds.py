"""Deltas that look at the base: what they are is the tensor that they end at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch

from peftkit.deltas.delta import Absolute, Delta, LowRank, Rows

Value = TypeVar("Value")

_PIECE = 1 << 21
"""Numbers of the base that one pass over it holds at a time."""


class PerBase(Generic[Value]):
    """A value that depends on the base alone, kept for the base that was asked for last."""

    def __init__(self) -> None:
        self._kept: tuple[Rows, Value] | None = None

    def get(self, base: Rows, compute: Callable[[], Value]) -> Value:
        """The value for this base."""
        kept = self._kept
        if kept is None or kept[0] != base:
            kept = self._kept = (base, compute())
        return kept[1]


@dataclass(frozen=True)
class Dora(Absolute):
    """W' = m · V / ‖V‖ with V = W + s·B@A (arXiv 2402.09353, equation 5); m and ‖V‖ have one number for each output."""

    kind: ClassVar[str] = "DoRA"

    shape: tuple[int, ...]
    low: LowRank
    magnitude: torch.Tensor
    """One number for each row of the matrix, or each column."""
    by_column: bool = False
    """Outputs are columns: of GPT-2's Conv1D, and of an embedding, which PEFT normalises over the vocabulary."""
    _norms: PerBase[torch.Tensor] = field(default_factory=PerBase, compare=False, repr=False)

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of W'. By columns, the first call for a base reads all of it once."""
        direction = self._direction(first, last, base)
        if self.by_column:
            norms = self._norms.get(base, lambda: self._column_norms(base))
            return direction * (self.magnitude.double() / norms)
        norms = torch.linalg.vector_norm(direction, dim=1)
        return direction * (self.magnitude[first:last].double() / norms)[:, None]

    def _direction(self, first: int, last: int, base: Rows) -> torch.Tensor:
        return base(first, last) + self.low.rows(first, last)

    def _column_norms(self, base: Rows) -> torch.Tensor:
        rows, columns = self.matrix
        step = max(1, _PIECE // columns)
        squares = torch.zeros(columns, dtype=torch.float64)
        for first in range(0, rows, step):
            squares += self._direction(first, min(first + step, rows), base).square().sum(dim=0)
        return squares.sqrt()


@dataclass(frozen=True)
class Scaled(Delta):
    """W' = W · l, one factor for each row, each column or each number (IA3, arXiv 2205.05638)."""

    kind: ClassVar[str] = "IA3"
    additive: ClassVar[bool] = False

    shape: tuple[int, ...]
    factors: torch.Tensor
    """Shape (rows, 1), (1, columns) or `matrix`."""

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of W · (l - 1)."""
        return base(first, last) * (self._rows(first, last) - 1)

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of W · l."""
        return base(first, last) * self._rows(first, last)

    def _rows(self, first: int, last: int) -> torch.Tensor:
        factors = self.factors.double()
        return factors if factors.shape[0] == 1 else factors[first:last]


@dataclass(frozen=True)
class Modulated(Delta):
    """W' = W · (1 + B@A), number by number (HiRA)."""

    kind: ClassVar[str] = "HiRA"
    additive: ClassVar[bool] = False

    shape: tuple[int, ...]
    low: LowRank

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of W · (B@A)."""
        return base(first, last) * self.low.rows(first, last)

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of W'."""
        return base(first, last) * (1 + self.low.rows(first, last))


@dataclass(frozen=True)
class Replaced(Absolute):
    """Another tensor takes the base's place; it may have more or fewer rows than the base (a resized vocabulary)."""

    kind: ClassVar[str] = "a saved tensor"

    shape: tuple[int, ...]
    values: torch.Tensor
    held: int
    """How many rows the base has; ΔW of a row that it lacks is that row."""

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of the new tensor minus those that the base has."""
        return minus_base(self.merged(first, last, base), first, self.held, base)

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of the new tensor."""
        return self.values.reshape(self.matrix)[first:last].double()


@dataclass(frozen=True)
class TokenRows(Absolute):
    """Some rows of an embedding or a head are replaced (`trainable_token_indices`)."""

    kind: ClassVar[str] = "trained tokens"

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    values: torch.Tensor
    """One row for each of `indices`, in that order."""

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows, the trained ones in their places."""
        rows = base(first, last).clone()
        indices = torch.tensor(self.indices, dtype=torch.long)
        here = (indices >= first) & (indices < last)
        rows[indices[here] - first] = self.values[here].double()
        return rows


@dataclass(frozen=True)
class After(Absolute):
    """A delta of a tensor that is itself replaced: LoRA on an embedding whose vocabulary was resized."""

    kind: ClassVar[str] = "a saved tensor and a change of it"

    first: Replaced
    then: Delta
    _bases: PerBase[Rows] = field(default_factory=PerBase, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the replaced tensor."""
        return self.first.shape

    def change(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of the merged tensor minus those that the base has."""
        return minus_base(self.merged(first, last, base), first, self.first.held, base)

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of the changed replacement."""
        return self.then.merged(first, last, self._bases.get(base, lambda: self._replaced(base)))

    def _replaced(self, base: Rows) -> Rows:
        return lambda first, last: self.first.merged(first, last, base)


def minus_base(rows: torch.Tensor, first: int, held: int, base: Rows) -> torch.Tensor:
    """Rows `first` and on minus the base's; the base has `held` of them and is not asked for more."""
    common = max(0, min(first + rows.shape[0], held) - first)
    changed = rows.clone()
    if common:
        changed[:common] -= base(first, first + common)
    return changed
