"""What a combination of adapters would be, from factors alone: a look before a choice of method, weights and rank.

Every figure comes from the factors in coordinates of their common spaces (`spectrum.joint`); only signs need entries
of ΔW, and those are sampled (`signs`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from peftkit.deltas import spectrum
from peftkit.deltas.combining.dense_time import dense_time
from peftkit.deltas.combining.methods import check_weights
from peftkit.deltas.delta import Additive, Delta, Deltas, LowRank
from peftkit.deltas.parts import low_rank_parts, products_by_rows, side_by_side
from peftkit.deltas.previewing import signs
from peftkit.deltas.previewing.figures import NotShown, Preview
from peftkit.deltas.previewing.tensor import Look, PairAngles, figures, look, pairs, root_sum
from peftkit.deltas.spectrum import Angles
from peftkit.errors import DeltaError
from peftkit.events import Phase, Progress, Report, silent

__all__ = ["Preview", "preview"]

RANKS = (8, 16, 32, 64)
SHARES = (95, 99)


def preview(
    parents: Sequence[Deltas],
    weights: Sequence[float],
    *,
    ranks: Sequence[int] = RANKS,
    seed: int = 0,
    sample: int = signs.SAMPLE,
    report: Report = silent,
) -> Preview:
    """What Σ weight · ΔW would be, in O((m + n) (Σ rank)²) for a tensor of m × n; no dense ΔW is computed.

    `ranks` are those to say the error of; `sample` entries of each tensor, drawn with `seed`, show its signs. Deltas
    without factors are in `not_shown`. Raises DeltaError for weights that are no finite numbers, one for each parent.
    """
    _check(parents, weights)
    parents = side_by_side(parents)
    names = sorted({name for parent in parents for name in parent.changes})
    report(Phase("preview", len(names), "tensors"))
    seen: list[Look] = []
    missing: list[NotShown] = []
    for done, name in enumerate(names, 1):
        found = _gather(name, parents, missing)
        if found:
            seen.append(look(name, found, parents, weights, seed=seed, sample=sample))
        report(Progress(done, {}))
    missing += [_new(parent, name) for parent in parents for name in sorted(parent.added)]
    return _whole(seen, parents, weights, ranks, missing)


def _check(parents: Sequence[Deltas], weights: Sequence[float]) -> None:
    if not parents or len(parents) != len(weights):
        raise DeltaError(
            f"{len(parents)} adapters with the weights {list(weights)}",
            expected="one adapter or more, and a weight for each",
        )
    check_weights(weights)


def _gather(name: str, parents: Sequence[Deltas], missing: list[NotShown]) -> dict[int, tuple[LowRank, ...]]:
    """Parent → the low-rank matrices of this tensor; what has none, or another shape, goes to `missing`."""
    found: dict[int, tuple[LowRank, ...]] = {}
    first: list[tuple[int, int]] | None = None
    for index, parent in enumerate(parents):
        delta = parent.changes.get(name)
        if delta is None:
            continue
        parts = low_rank_parts(delta)
        matrices = [part.matrix for part in parts or ()]
        if parts is None:
            missing.append(_not_shown(parent, name, delta, "it has no factors"))
        elif first is not None and matrices != first:
            reason = f"it is {_shapes(matrices)}, that of the first {_shapes(first)}"
            missing.append(_not_shown(parent, name, delta, reason))
        else:
            first, found[index] = matrices, parts
    return found


def _shapes(matrices: Sequence[tuple[int, int]]) -> str:
    rows, columns = matrices[0]
    return f"{len(matrices)} × {rows} × {columns}" if len(matrices) > 1 else f"{rows} × {columns}"


def _not_shown(parent: Deltas, name: str, delta: Delta, reason: str) -> NotShown:
    norm = math.sqrt(products_by_rows(delta, delta)[0]) if isinstance(delta, Additive) else None
    if norm is None:
        reason += ", and its ΔW depends on the base"
    return NotShown(parent.reference, name, delta.kind, reason, norm)


def _new(parent: Deltas, name: str) -> NotShown:
    """A tensor of a task's head that the base does not have: there is no ΔW of it."""
    norm = float(torch.linalg.vector_norm(parent.added[name].double()))
    return NotShown(parent.reference, name, "a new tensor", "the base has none: it is the head's", norm)


def _whole(
    seen: Sequence[Look],
    parents: Sequence[Deltas],
    weights: Sequence[float],
    ranks: Sequence[int],
    missing: Sequence[NotShown],
) -> Preview:
    """The figures of all tensors as one long vector."""
    products = sum((each.products for each in seen), torch.zeros(len(parents), len(parents), dtype=torch.float64))
    values = root_sum([each.values for each in seen])
    samples = [sample for each in seen for sample in each.samples]
    squares = [each.linear_square for each in seen if each.rank]
    linear = None if None in squares or not squares else math.fsum(filter(None, squares))
    found = pairs(parents, products, _mean_angles([each.angles for each in seen], len(parents)))
    return Preview(
        references=tuple(parent.reference for parent in parents),
        weights=tuple(weights),
        dense=dense_time([matrix for each in seen for matrix in each.matrices]),
        tensors=tuple(each.shown for each in seen),
        overall=figures(products, values, weights, found, samples, linear),
        spectrum=tuple(values.tolist()),
        ranks={share: spectrum.rank_for(values, share / 100) for share in SHARES},
        residuals={rank: _residual(values, rank) for rank in ranks},
        exact_rank=max((each.rank for each in seen), default=0),
        exact_bytes=sum(each.bytes for each in seen),
        sampled=sum(sample.mass.numel() for sample in samples),
        not_shown=tuple(missing),
    )


def _mean_angles(of_tensors: Sequence[PairAngles], parents: int) -> PairAngles:
    """The mean over the tensors that both change of the mean cosine, and the largest of all."""
    overall: dict[tuple[int, int], tuple[Angles, Angles] | None] = {}
    for pair in itertools.combinations(range(parents), 2):
        known = [each for angles in of_tensors if (each := angles.get(pair)) is not None]
        if known:
            write, read = zip(*known, strict=True)
            overall[pair] = _mean(write), _mean(read)
    return overall


def _mean(angles: Sequence[Angles]) -> Angles:
    mean = math.fsum(each.mean for each in angles) / len(angles)
    return Angles(mean, min(each.min for each in angles), max(each.max for each in angles))


def _residual(values: torch.Tensor, rank: int) -> float | None:
    whole = float(torch.linalg.vector_norm(values))
    return float(torch.linalg.vector_norm(values[rank:])) / whole if whole else None
