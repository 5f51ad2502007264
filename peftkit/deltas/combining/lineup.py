"""Several adapters side by side: which of them touches which tensor of the base, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from peftkit.base.dense import Dense
from peftkit.deltas.combining.methods import How
from peftkit.deltas.delta import Added, Additive, Delta, Deltas, LowRank, Place, Rows, Stacked
from peftkit.deltas.reading.products import factored
from peftkit.errors import DeltaError


@dataclass(frozen=True)
class Part:
    """What one adapter does to a tensor."""

    delta: Delta
    weight: float
    reference: str


@dataclass(frozen=True)
class Block:
    """A matrix that a method works on: a whole tensor, or one expert of a fused one."""

    first: int
    last: int
    """Rows of the tensor's `matrix`."""
    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the base, and what the adapters do to it."""

    name: str
    shape: tuple[int, ...]
    place: Place
    parts: tuple[Part, ...]
    """In the order of the adapters, without those that leave the tensor alone."""
    held: int
    """How many rows of `matrix` the base has: fewer or more where the vocabulary was resized."""

    @property
    def weights(self) -> list[float]:
        """One for each part."""
        return [part.weight for part in self.parts]

    @property
    def vector(self) -> bool:
        """Whether it has one dimension, as biases and norms have."""
        return len(self.shape) < 2

    @property
    def fused(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return len(self.shape) == 3 and self.place.layer == "experts"

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) that the tensor is read as; experts lie one below the other."""
        return matrix_of(self.shape, self.fused)

    @property
    def blocks(self) -> list[Block]:
        """Its experts, or itself."""
        if not self.fused:
            return [Block(0, self.matrix[0], 0, self.shape)]
        height = self.shape[1]
        return [Block(i * height, (i + 1) * height, i, self.shape[1:]) for i in range(self.shape[0])]

    @property
    def inputs_first(self) -> bool:
        """Whether the file has it as (in, out), so that its columns are outputs."""
        return self.place.layer in ("conv1d", "embedding") or self.place.transposed

    def factors(self, block: Block) -> list[LowRank] | None:
        """(out, in) factors of all parts, None when one of them has none."""
        found: list[LowRank] = []
        for part in self.parts:
            if not isinstance(part.delta, LowRank | Stacked):
                return None
            found.append(part.delta if isinstance(part.delta, LowRank) else part.delta.blocks[block.index])
        return [turned(delta) for delta in found] if self.inputs_first else found

    def factored(self, block: Block, how: How) -> LowRank | None:
        """The method's result from the parts' factors, in the file's orientation; None where it needs the entries."""
        factors = self.factors(block) if how.entry.factored else None
        if factors is None or how.entry.factored is None:
            return None
        result = how.entry.factored(factors, self.weights, how.values)
        result = turned(result) if self.inputs_first else result
        return LowRank(block.shape, result.left, result.right, result.scale)

    def combined(self, block: Block, how: How, base: Rows) -> torch.Tensor:
        """The method's result on the dense ΔWs: float64, rows and columns of the block as the file has them."""
        matrices = [self.change(part, block.first, block.last, base) for part in self.parts]
        if self.inputs_first:
            matrices = [matrix.T for matrix in matrices]
        draws = how.draws(self.name, block.index, [part.reference for part in self.parts])
        result = how.entry.dense(matrices, self.weights, how.values, draws)
        return result.T if self.inputs_first else result

    def change(self, part: Part, first: int, last: int, base: Rows) -> torch.Tensor:
        """Rows of a part's ΔW; `base` has the columns of `matrix`, the part may have one row for each expert."""
        columns = part.delta.matrix[1]
        many = columns // self.matrix[1]
        if many == 1:
            return part.delta.change(first, last, base)
        top, bottom = first // many, -(-last // many)

        def wide(one: int, other: int) -> torch.Tensor:
            return base(one * many, other * many).reshape(other - one, columns)

        found = part.delta.change(top, bottom, wide).reshape(-1, self.matrix[1])
        return found[first - top * many : last - top * many]


def matrix_of(shape: tuple[int, ...], fused: bool = False) -> tuple[int, int]:
    """(rows, columns) of the matrix that a tensor is read as; a vector is one row."""
    if fused:
        return shape[0] * shape[1], shape[2]
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def turned(delta: LowRank) -> LowRank:
    """The transposed ΔW of a matrix."""
    return LowRank((delta.matrix[1], delta.matrix[0]), delta.right.T, delta.left.T, delta.scale)


@dataclass(frozen=True)
class Lineup:
    """All tensors that at least one adapter touches, by name, sorted."""

    tensors: Mapping[str, Tensor]
    bases: Mapping[str, Rows]
    """Tensor → rows of the base, with the columns of its `matrix`."""
    sources: Mapping[str, str]
    """As in Deltas, of all adapters."""
    shared: Mapping[str, Place]
    """As in Deltas, without what one of the adapters parts."""


def check_heads(parents: Sequence[Deltas]) -> None:
    """Raise DeltaError for adapters with a task's head: heads are functions of what lies beneath them.

    Two heads that began at the same numbers were trained over different ΔW; their mean over the combined ΔW is what
    neither was trained for, and of different labels there is no mean.
    """
    with_head = [parent for parent in parents if parent.headed is not None and not parent.headed.answers]
    if with_head:
        said = ", ".join(f"{each.reference} (a {each.headed.head.kind} head)" for each in with_head if each.headed)
        raise DeltaError(
            f"heads of different adapters cannot be combined: {said}",
            expected="adapters without a task's head, or one such adapter at its full weight",
            hint="merge or serve each: peftkit merge NAME --out FOLDER, peftkit predict NAME FILE",
        )


def line_up(parents: Sequence[Deltas], weights: Sequence[float], how: How, base: Mapping[str, Dense]) -> Lineup:
    """Put the adapters' deltas side by side, tensor by tensor.

    Where one adapter parts head and embedding and another changes both as one, the other's change counts for both.
    Raises DeltaError, naming all tensors, when two adapters give one another shape or source, or the base has it not;
    and for adapters with a task's head.
    """
    check_heads(parents)
    how.check_weights(weights, len(parents))
    sources = _sources(parents, base)
    changes = [_changes(parent, sources) for parent in parents]
    tensors, problems = {}, []
    for name in sorted({name for found in changes for name in found}):
        touching = [i for i, found in enumerate(changes) if name in found]
        shapes = [changes[i][name].shape for i in touching]
        read = sources.get(name, name)
        if len(set(shapes)) > 1:
            said = ", ".join(f"{parents[i].reference} {list(changes[i][name].shape)}" for i in touching)
            problems.append(f"{name} has different shapes: {said}")
        elif read not in base:
            problems.append(f"{name} of {parents[touching[0]].reference} is not a tensor of the base")
        elif not _fits(shapes[0], base[read].shape):
            where = f"{parents[touching[0]].reference}, {list(base[read].shape)} in the base"
            problems.append(f"{name} is {list(shapes[0])} in {where}")
        else:
            given = enumerate(changes) if how.entry.pair else ((i, changes[i]) for i in touching)
            parts = tuple(
                Part(_with_factors(found.get(name, Untouched(shapes[0]))), float(weights[i]), parents[i].reference)
                for i, found in given
            )
            place = _place(name, parents, sources)
            tensors[name] = _tensor(name, shapes[0], place, parts, base[read])
    if problems:
        raise DeltaError(
            f"{' and '.join(parent.reference for parent in parents)} do not fit together: " + "; ".join(problems),
            expected="adapters of one base, with the same vocabulary",
            hint="peftkit show NAME says which base each was trained on",
        )
    bases = {name: rows_of(base[sources.get(name, name)], tensor.matrix[1]) for name, tensor in tensors.items()}
    parted = set(sources.values())
    shared = {name: place for parent in parents for name, place in parent.shared.items() if name not in parted}
    return Lineup(tensors, bases, sources, shared)


def _tensor(name: str, shape: tuple[int, ...], place: Place, parts: tuple[Part, ...], base: Dense) -> Tensor:
    columns = matrix_of(shape, len(shape) == 3 and place.layer == "experts")[1]
    held = math.prod(base.shape) // max(columns, 1)
    return Tensor(name, shape, place, parts, held)


@dataclass(frozen=True)
class Untouched(Additive):
    """ΔW = 0: one of two adapters leaves the tensor alone."""

    kind: ClassVar[str] = "nothing"

    shape: tuple[int, ...]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of zeros."""
        return torch.zeros(last - first, self.matrix[1], dtype=torch.float64)


def rows_of(dense: Dense, columns: int) -> Rows:
    """Rows of a base's tensor as float64, read from its file when they are asked for."""

    def rows(first: int, last: int) -> torch.Tensor:
        numbers = dense.part(first * columns, last * columns).astype(np.float64)
        return torch.from_numpy(numbers).reshape(last - first, columns)

    return rows


def _with_factors(delta: Delta) -> Delta:
    """LoHa and LoKr as the LoRA that they exactly are, where its factors are smaller than ΔW."""
    found = factored(delta)
    if found is None or found.rank * sum(found.matrix) >= math.prod(found.matrix):
        return delta
    return found


def _sources(parents: Sequence[Deltas], base: Mapping[str, Dense]) -> dict[str, str]:
    found: dict[str, str] = {}
    for parent in parents:
        for name, source in parent.sources.items():
            if found.setdefault(name, source) != source or name in base:
                other = "the base holds it itself" if name in base else f"another begins it as {found[name]}"
                raise DeltaError(
                    f"{parent.reference} begins {name} as a copy of {source}, and {other}",
                    expected="adapters of one base, whose head is tied for all of them or for none",
                )
    return found


def _changes(parent: Deltas, sources: Mapping[str, str]) -> dict[str, Delta]:
    """An adapter's changes; one that keeps head and embedding tied changes the head as it does the embedding."""
    found = dict(parent.changes)
    for name, source in sources.items():
        if name not in parent.sources and source in parent.changes:
            found[name] = parent.changes[source]
    return found


def _place(name: str, parents: Sequence[Deltas], sources: Mapping[str, str]) -> Place:
    """Where the tensor stands, by preference according to an adapter that has factors for it."""
    touching = sorted(
        (parent for parent in parents if name in parent.places),
        key=lambda parent: not isinstance(parent.changes.get(name), LowRank | Stacked | Added),
    )
    if touching:
        return touching[0].places[name]
    both = (parent.shared[sources[name]] for parent in parents if sources.get(name) in parent.shared)
    return next(both, Place(name.rpartition(".")[0], "other"))


def _fits(shape: tuple[int, ...], held: tuple[int, ...]) -> bool:
    """Whether a tensor has the base's shape, or more or fewer rows of it."""
    return tuple(shape) == tuple(held) or (len(shape) == len(held) == 2 and shape[1] == held[1])
