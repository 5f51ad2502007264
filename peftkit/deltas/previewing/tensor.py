"""The preview of one tensor: what several adapters do to it, and what their sum would be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from peftkit.deltas import spectrum
from peftkit.deltas.delta import Deltas, LowRank, Place
from peftkit.deltas.parts import is_vector
from peftkit.deltas.previewing import signs
from peftkit.deltas.previewing.figures import Figures, Pair, TensorPreview
from peftkit.deltas.spectrum import Angles

# PEFT keeps these transposed, so that its lora_A, which carries the sign of a weight, is the left factor here.
_TRANSPOSED = ("conv1d", "embedding")

PairAngles = Mapping[tuple[int, int], tuple[Angles, Angles] | None]
"""Two parents by their places → angles of what they write and of what they read."""


@dataclass(frozen=True)
class Look:
    """Figures of one tensor, and what those of all tensors are computed from."""

    shown: TensorPreview
    products: torch.Tensor
    """⟨ΔWᵢ, ΔWⱼ⟩, shape (parents, parents), float64; zeros where a parent leaves the tensor alone."""
    values: torch.Tensor
    """√Σ σₖ² of the combination over the matrices that the tensor consists of, falling."""
    linear_square: float | None
    """Square of the error of averaged factors; None where the ranks differ, or for a vector."""
    samples: tuple[signs.Sample, ...]
    angles: PairAngles
    matrices: tuple[tuple[int, int, int], ...]
    """(rows, columns, adapters) of each matrix; none for a vector."""
    rank: int
    """Of the exact combination; 0 for a vector."""
    bytes: int


def look(
    name: str,
    found: Mapping[int, tuple[LowRank, ...]],
    parents: Sequence[Deltas],
    weights: Sequence[float],
    *,
    seed: int,
    sample: int,
) -> Look:
    """All figures of one tensor; `found` has the matrices of the parents that change it, by the parents' places."""
    at, scales = list(found), [weights[index] for index in found]
    delta, place = parents[at[0]].changes[name], parents[at[0]].places.get(name)
    blocks = list(zip(*found.values(), strict=True))
    each = max(2, sample // len(blocks))
    samples = tuple(signs.sample(b, scales, f"{name}[{n}]", seed, each) for n, b in enumerate(blocks))
    joined = [spectrum.joint(block) for block in blocks]
    cores = [[part.rows(0, part.matrix[0]) for part in block] for block in joined]
    vector = is_vector(delta)
    products, values = _products(cores, at, len(parents)), _values(cores, scales)
    angles: PairAngles = {} if vector else _all_angles(joined, at)
    linear = None if vector else _linear_square(joined, cores, scales, place)
    overall = figures(products, values, weights, pairs(parents, products, angles), samples, linear)
    norms = tuple(norm if index in found else None for index, norm in enumerate(overall.norms))
    ranks = tuple(found[index][0].rank if index in found else None for index in range(len(parents)))
    rank = sum(part.rank for part in blocks[0])
    return Look(
        shown=TensorPreview(name, delta.shape, ranks, replace(overall, norms=norms), spectrum.rank_for(values, 0.95)),
        products=products,
        values=values,
        linear_square=linear,
        samples=samples,
        angles=angles,
        matrices=() if vector else tuple((*block[0].matrix, len(at)) for block in blocks),
        rank=0 if vector else rank,
        bytes=_stored_bytes(blocks),
    )


def figures(
    products: torch.Tensor,
    values: torch.Tensor,
    weights: Sequence[float],
    pairs: tuple[Pair, ...],
    samples: Sequence[signs.Sample],
    linear_square: float | None,
) -> Figures:
    """Figures from the products of the deltas, the singular values of their sum, and a sample of entries."""
    norms = [math.sqrt(float(square)) for square in products.diagonal()]
    separate = math.fsum(abs(weight) * norm for weight, norm in zip(weights, norms, strict=True))
    combined = float(torch.linalg.vector_norm(values))
    return Figures(
        norms=tuple(norms),
        separate_norm=separate,
        combined_norm=combined,
        pairs=pairs,
        sign_conflict=signs.conflict(samples),
        outvoted=signs.outvoted(samples),
        cancellation=max(0.0, 1 - combined / separate) if separate else None,
        linear_error=None if linear_square is None else _over(math.sqrt(linear_square), combined),
    )


def pairs(parents: Sequence[Deltas], products: torch.Tensor, spaces: PairAngles) -> tuple[Pair, ...]:
    """Cosines of all pairs, with the angles that are known."""
    found = []
    for i, j in itertools.combinations(range(len(parents)), 2):
        length = math.sqrt(float(products[i, i])) * math.sqrt(float(products[j, j]))
        cosine = max(-1.0, min(1.0, float(products[i, j]) / length)) if length else None
        write, read = spaces.get((i, j)) or (None, None)
        found.append(Pair(parents[i].reference, parents[j].reference, cosine, write, read))
    return tuple(found)


def root_sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """At place k, √Σ σₖ² over several matrices."""
    squares = torch.zeros(max((each.numel() for each in values), default=0), dtype=torch.float64)
    for each in values:
        squares[: each.numel()] += each.square()
    return squares.sqrt()


def _products(cores: Sequence[Sequence[torch.Tensor]], at: Sequence[int], parents: int) -> torch.Tensor:
    found = torch.zeros(parents, parents, dtype=torch.float64)
    for block in cores:
        flat = torch.stack([core.flatten() for core in block])
        found[torch.tensor(at)[:, None], torch.tensor(at)] += flat @ flat.T
    return found


def _values(cores: Sequence[Sequence[torch.Tensor]], weights: Sequence[float]) -> torch.Tensor:
    """Singular values of the combination, for experts √Σ σₖ² over all: cut at rank k, that much of place k is kept."""
    return root_sum([torch.linalg.svdvals(_sum(block, weights)) for block in cores])


def _sum(cores: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return torch.stack([core * weight for core, weight in zip(cores, weights, strict=True)]).sum(0)


def _linear_square(
    joined: Sequence[Sequence[LowRank]],
    cores: Sequence[Sequence[torch.Tensor]],
    weights: Sequence[float],
    place: Place | None,
) -> float | None:
    """‖(Σ √|w s| B)(Σ ±√|w s| A) − Σ w s B A‖², None for ranks that differ.

    PEFT 0.21, LoraModel._generalized_task_arithmetic_weighted_adapter: the sign of a weight goes to lora_A.
    """
    total = 0.0
    turned = place is not None and (place.transposed or place.layer in _TRANSPOSED)
    for block, parts in zip(joined, cores, strict=True):
        if len({delta.rank for delta in block}) > 1:
            return None
        scaled = [weight * delta.scale for weight, delta in zip(weights, block, strict=True)]
        roots = [math.sqrt(abs(each)) for each in scaled]
        signed = [math.copysign(root, each) for root, each in zip(roots, scaled, strict=True)]
        sides = (signed, roots) if turned else (roots, signed)
        left = _sum([delta.left for delta in block], sides[0])
        right = _sum([delta.right for delta in block], sides[1])
        total += float((left @ right - _sum(parts, weights)).square().sum())
    return total


def _all_angles(joined: Sequence[Sequence[LowRank]], at: Sequence[int]) -> PairAngles:
    """(write, read) of every pair of parents that change the tensor, over all experts where it has some."""
    bases = [[spectrum.spaces(delta) for delta in block] for block in joined]
    found: dict[tuple[int, int], tuple[Angles, Angles] | None] = {}
    for i, j in itertools.combinations(range(len(at)), 2):
        cosines = [spectrum.angles(block[i], block[j]) for block in bases]
        write, read = (Angles.of([pair[side] for pair in cosines]) for side in (0, 1))
        found[at[i], at[j]] = (write, read) if write and read else None
    return found


def _over(error: float, whole: float) -> float | None:
    return error / whole if whole else None


def _stored_bytes(blocks: Sequence[Sequence[LowRank]]) -> int:
    """Of the factors behind one another, in the widest dtype among them."""
    widest: int = max(factor.element_size() for block in blocks for part in block for factor in (part.left, part.right))
    return sum(sum(block[0].matrix) * sum(part.rank for part in block) for block in blocks) * widest
