"""A delta as low-rank matrices, for what is computed from factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from peftkit.deltas.delta import Added, Additive, Delta, Deltas, LowRank, Stacked

_PIECE = 1 << 20  # entries of ΔW in memory at once


def low_rank_parts(delta: Delta) -> tuple[LowRank, ...] | None:
    """The matrices that the delta consists of: one, or one for each expert; None for what has no factors.

    A vector (a bias, a norm) is a matrix of one row and of rank 1.
    """
    if isinstance(delta, LowRank):
        return (delta,)
    if isinstance(delta, Stacked):
        return delta.blocks
    if isinstance(delta, Added) and delta.matrix[0] == 1:
        row = delta.values.reshape(delta.matrix)
        return (LowRank(delta.matrix, row.new_ones(1, 1), row, delta.scale),)
    return None


def side_by_side(parents: Sequence[Deltas]) -> list[Deltas]:
    """The same adapters over one set of tensors: where one parts head and embedding of a tied base, the others' change
    of the embedding is their change of the head too.
    """
    sources = {name: source for parent in parents for name, source in parent.sources.items()}
    return [
        replace(parent, changes={**_copied(parent, sources), **parent.changes}) if sources else parent
        for parent in parents
    ]


def is_vector(delta: Delta) -> bool:
    """Whether it changes a vector, which has no spaces that it writes to and reads from."""
    return delta.matrix[0] == 1


def products_by_rows(one: Additive, other: Additive) -> tuple[float, float, float, float]:
    """(‖ΔW₁‖², ⟨ΔW₁, ΔW₂⟩, ‖ΔW₂‖², ‖ΔW₁ − ΔW₂‖²) of deltas without factors, by rows of a bounded size."""
    rows, columns = one.matrix
    step = max(1, _PIECE // max(columns, 1))
    found = torch.zeros(4, dtype=torch.float64)
    for first in range(0, rows, step):
        a, b = (delta.rows(first, min(first + step, rows)) for delta in (one, other))
        found += torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum(), (a - b).square().sum()])
    left, inner, right, difference = found.tolist()
    return left, inner, right, difference


def _copied(parent: Deltas, sources: dict[str, str]) -> dict[str, Delta]:
    return {
        name: parent.changes[source]
        for name, source in sources.items()
        if name not in parent.sources and source in parent.changes
    }
