"""How two adapters' delta weights differ, tensor by tensor, whatever the gauge of their factors (B · 2, A / 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peftkit.deltas import spectrum
from peftkit.deltas.delta import Additive, Delta, Deltas, LowRank
from peftkit.deltas.parts import is_vector, low_rank_parts, products_by_rows, side_by_side
from peftkit.deltas.reading.kinds import Replaced
from peftkit.deltas.spectrum import Angles


@dataclass(frozen=True)
class Products:
    """Squares and product of two deltas, from which norms and cosine follow; they add up over tensors."""

    left: float
    """‖ΔW₁‖²."""
    inner: float
    """⟨ΔW₁, ΔW₂⟩."""
    right: float
    """‖ΔW₂‖²."""
    difference: float
    """‖ΔW₁ − ΔW₂‖², computed as such: the other three lose its digits where the two are nearly the same."""


@dataclass(frozen=True)
class Distance:
    """How far two deltas are apart."""

    left_norm: float
    right_norm: float
    cosine: float | None
    """None where one of them is zero."""
    relative: float | None
    """‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖; None where the first is zero and the second is not."""

    @classmethod
    def of(cls, products: Products) -> Distance:
        """Norms, cosine and relative difference."""
        left, right = math.sqrt(products.left), math.sqrt(products.right)
        cosine = max(-1.0, min(1.0, products.inner / left / right)) if left and right else None
        apart = spectrum.relative(math.sqrt(products.difference), left)
        return cls(left, right, cosine, apart if math.isfinite(apart) else None)


@dataclass(frozen=True)
class TensorDistance:
    """One tensor that both adapters change."""

    name: str
    distance: Distance
    write: Angles | None
    """Of the column spaces, over experts the mean of all; None without factors or where one of them is zero."""
    read: Angles | None
    """Of the row spaces."""


@dataclass(frozen=True)
class DeltaComparison:
    """All tensors that two adapters change."""

    left: str
    right: str
    tensors: tuple[TensorDistance, ...]
    overall: Distance
    """Of all compared tensors, and of those that one adapter alone changes, as one long vector."""
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    not_compared: dict[str, str]
    """Tensor → why no figure includes it."""

    def as_record(self) -> dict[str, Any]:
        """The comparison as plain JSON."""
        return asdict(self)


def compare_deltas(left: Deltas, right: Deltas) -> DeltaComparison:
    """Norms, cosines, principal angles and relative differences, from factors in O((m + n) (r₁ + r₂)²) for each tensor.

    Deltas without factors that need no base are computed by rows. What depends on the base (DoRA, a replaced tensor)
    and what has two shapes is in `not_compared`.
    """
    left, right = side_by_side([left, right])
    tensors: list[TensorDistance] = []
    products: list[Products] = []
    refused: dict[str, str] = {}
    for name in sorted({*left.changes, *right.changes}):
        pair = left.changes.get(name), right.changes.get(name)
        reason = _refusal([delta for delta in pair if delta is not None])
        if reason:
            refused[name] = reason
            continue
        found, write, read = _measured(*pair)
        products.append(found)
        if None not in pair:
            tensors.append(TensorDistance(name, Distance.of(found), write, read))
    refused |= _heads(left, right)
    return DeltaComparison(
        left=left.reference,
        right=right.reference,
        tensors=tuple(tensors),
        overall=Distance.of(_sum(products)),
        only_left=tuple(sorted(left.changes.keys() - right.changes.keys())),
        only_right=tuple(sorted(right.changes.keys() - left.changes.keys())),
        not_compared=refused,
    )


def _heads(left: Deltas, right: Deltas) -> dict[str, str]:
    """Tensors of tasks' heads that the base does not have, → what is known of them without a ΔW."""
    found = {}
    for name in sorted({*left.added, *right.added}):
        pair = [each.added[name] for each in (left, right) if name in each.added]
        if len(pair) < 2:
            found[name] = "one adapter's head alone has it"
        elif pair[0].shape != pair[1].shape:
            found[name] = f"the shapes are {' and '.join(str(tuple(each.shape)) for each in pair)}"
        else:
            same = torch.equal(*pair)
            found[name] = "both heads have the same tensor" if same else "the heads' own, of which the base has none"
    return found


def _refusal(deltas: Sequence[Delta]) -> str | None:
    if len(deltas) == 2 and _same_tensor(*deltas):
        return "both put the same tensor in its place"
    absolute = sorted({delta.kind for delta in deltas if not isinstance(delta, Additive)})
    if absolute:
        return f"ΔW of {' and '.join(absolute)} depends on the base's weights"
    if len({delta.shape for delta in deltas}) > 1:
        return f"the shapes are {' and '.join(str(delta.shape) for delta in deltas)}"
    return None


def _same_tensor(one: Delta, other: Delta) -> bool:
    return isinstance(one, Replaced) and isinstance(other, Replaced) and torch.equal(one.values, other.values)


_Measured = tuple[Products, Angles | None, Angles | None]


def _measured(one: Delta | None, other: Delta | None) -> _Measured:
    """Products and angles (write, read) of what two adapters do to a tensor; None is a delta of zeros."""
    if one is None or other is None:
        square = _square(one or other)
        return Products(square if one else 0.0, 0.0, square if other else 0.0, square), None, None
    lefts, rights = low_rank_parts(one), low_rank_parts(other)
    if lefts is None or rights is None or len(lefts) != len(rights):
        return Products(*products_by_rows(_additive(one), _additive(other))), None, None
    joined = [spectrum.joint(pair) for pair in zip(lefts, rights, strict=True)]
    cosines = [] if is_vector(one) else [spectrum.principal_cosines(*pair) for pair in joined]
    write, read = (Angles.of([pair[side] for pair in cosines]) for side in (0, 1))
    return _sum([_products(*pair) for pair in joined]), write, read


def _products(one: LowRank, other: LowRank) -> Products:
    left, right = (delta.rows(0, delta.matrix[0]) for delta in (one, other))
    return Products(*(float(each.sum()) for each in (left**2, left * right, right**2, (left - right) ** 2)))


def _square(delta: Delta | None) -> float:
    parts = low_rank_parts(delta) if delta else ()
    if parts is None:
        return products_by_rows(_additive(delta), _additive(delta))[0]
    return math.fsum(spectrum.norm(part) ** 2 for part in parts)


def _additive(delta: Delta | None) -> Additive:
    if not isinstance(delta, Additive):
        raise TypeError(f"{delta!r} depends on the base")
    return delta


def _sum(products: Sequence[Products]) -> Products:
    return Products(
        math.fsum(each.left for each in products),
        math.fsum(each.inner for each in products),
        math.fsum(each.right for each in products),
        math.fsum(each.difference for each in products),
    )
