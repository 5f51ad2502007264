"""The formulas that make one delta weight of several: functions on float64 matrices of one shape.

A matrix has outputs as rows and inputs as columns. wᵢ is the weight of ΔWᵢ, and all formulas are those of the papers
with the deltas taken as task vectors. The ones that drop entries by chance take one generator for each delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from peftkit.deltas.delta import LowRank
from peftkit.deltas.spectrum import Svd, stacked, svd

Matrices = Sequence[torch.Tensor]
Weights = Sequence[float]
Options = Mapping[str, float]
Draws = Sequence[torch.Generator]
Dense = Callable[[Matrices, Weights, Options, Draws], torch.Tensor]
Factored = Callable[[Sequence[LowRank], Weights, Options], LowRank]


def linear(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """Σ wᵢ ΔWᵢ: task arithmetic (Ilharco et al., arXiv 2212.04089)."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total = total + delta * weight
    return total


def linear_factored(deltas: Sequence[LowRank], weights: Weights, options: Options) -> LowRank:
    """Σ wᵢ ΔWᵢ as factors side by side, whose rank is the sum of the ranks: no product, no error."""
    return stacked(deltas, weights)


def magnitude_prune(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """Σ wᵢ trim(ΔWᵢ): of each delta the share `density` with the largest magnitudes, not rescaled."""
    return linear([_trimmed(delta, options["density"]) for delta in deltas], weights, options, draws)


def breadcrumbs(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """Σ wᵢ mᵢ ⊙ ΔWᵢ: mᵢ drops the share `gamma` of largest magnitudes, and all but `density` of the smallest ones.

    Davari and Belilovsky, arXiv 2312.06795, section 3: both tails of each tensor are masked.
    """
    masked = []
    for delta in deltas:
        outliers = round(options["gamma"] * delta.numel())
        kept = max(1, round(options["density"] * delta.numel()))
        masked.append(delta * (_largest(delta, outliers + kept) & ~_largest(delta, outliers)))
    return linear(masked, weights, options, draws)


def dare_linear(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """Σ wᵢ mᵢ ⊙ ΔWᵢ / density: each entry is kept with probability `density`.

    Yu et al., arXiv 2311.03099, equation 3. Its mean over seeds is Σ wᵢ ΔWᵢ, an entry's variance
    Σ wᵢ² ΔWᵢ² (1 − density) / density.
    """
    return linear(_dare(deltas, options, draws), weights, options, draws)


def ties(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """scale · disjoint mean of the trimmed deltas over those that agree with the elected sign.

    Yadav et al., arXiv 2306.01708, section 4: keep the share `density` of each ΔWᵢ with the largest magnitudes; elect
    the sign of Σ wᵢ ΔWᵢ for each entry; average the entries of that sign.
    """
    return options["scale"] * _elected([_trimmed(delta, options["density"]) for delta in deltas], weights)


def dare_ties(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """TIES whose trimming is DARE's: entries dropped by chance, the others divided by `density`."""
    return options["scale"] * _elected(_dare(deltas, options, draws), weights)


def della(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """TIES whose trimming drops an entry the likelier, the smaller it is within its row (the paper's node).

    Deep, Bhardwaj and Poria, arXiv 2406.11617, section 3: with p = 1 − density, the entry of rank k (0 is the largest
    of n) is dropped with probability p + epsilon · (k / (n − 1) − 1/2), the others divided by their own probability of
    being kept; then signs are elected and averaged as in TIES, and multiplied by `scale` (λ). The paper divides by n:
    with n − 1 the mean is p exactly. Density 1 drops nothing.
    """
    density, epsilon = options["density"], options["epsilon"]
    if density == 1:
        return options["scale"] * _elected(deltas, weights)
    thinned = []
    for delta, draw in zip(deltas, draws, strict=True):
        places = delta.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1).double()
        spread = places / (delta.shape[1] - 1) - 0.5 if delta.shape[1] > 1 else torch.zeros_like(places)
        kept = density - epsilon * spread
        thinned.append(_kept(delta, kept, draw) / kept)
    return options["scale"] * _elected(thinned, weights)


def slerp(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """(w₁‖a‖ + w₂‖b‖) · (sin((1 − t)Ω) a/‖a‖ + sin(tΩ) b/‖b‖) / sin Ω with t = w₂ / (w₁ + w₂).

    Shoemake, SIGGRAPH 1985, on the directions of the two deltas, Ω the angle between them; the norms are interpolated
    (weights that sum to 1 give the usual formula). Where sin Ω ≈ 0 or a delta is zero: w₁a + w₂b.
    """
    one, other = deltas
    lengths = [float(torch.linalg.vector_norm(delta)) for delta in deltas]
    total = math.fsum(weights)
    cosine = float((one * other).sum()) / (lengths[0] * lengths[1]) if all(lengths) else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if total <= 0 or math.sin(angle) < 1e-6:
        return linear(deltas, weights, options, draws)
    t = weights[1] / total
    length = weights[0] * lengths[0] + weights[1] * lengths[1]
    first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return one * (length * first / lengths[0]) + other * (length * second / lengths[1])


def knots(deltas: Matrices, weights: Weights, options: Options, draws: Draws) -> torch.Tensor:
    """U Σ TIES(V₁ … Vₙ) with [ΔW₁ … ΔWₙ] = U Σ [V₁ … Vₙ], the deltas side by side along their inputs.

    Stoica et al., arXiv 2410.19735, section 4.2. Directions whose singular value is zero but for rounding are left out:
    they would take part in the trimming.
    """
    u, values, vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    left, right = _aligned(Svd(u, values, vh), deltas[0].shape[1], weights, options)
    return left @ right


def knots_factored(deltas: Sequence[LowRank], weights: Weights, options: Options) -> LowRank:
    """`knots` from the factors: [ΔW₁ … ΔWₙ] = [B₁ … Bₙ] · diag(A₁ … Aₙ); of rank Σr at most, nothing is m × m."""
    rows, columns = deltas[0].matrix
    left = torch.cat([delta.left.double() * delta.scale for delta in deltas], dim=1)
    right = torch.block_diag(*(delta.right.double() for delta in deltas))
    found = svd(LowRank((rows, columns * len(deltas)), left, right))
    return LowRank(deltas[0].shape, *_aligned(found, columns, weights, options))


def _aligned(found: Svd, columns: int, weights: Weights, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(U Σ, TIES of the V parts)."""
    limit = float(found.values[:1].sum()) * max(found.left.shape[0], found.right.shape[1]) * 2**-52
    rank = int((found.values > limit).sum())
    if not rank:
        return found.left[:, :1] * 0, found.right[:1, :columns] * 0
    parts = found.right[:rank].split(columns, dim=1)
    return found.left[:, :rank] * found.values[:rank], ties(parts, weights, options, ())


def _elected(deltas: Matrices, weights: Weights) -> torch.Tensor:
    """Σ wᵢ ΔWᵢ / Σ |wᵢ| over the entries whose wᵢ ΔWᵢ has the sign of Σ wᵢ ΔWᵢ; 0 where that sum is 0.

    A sum below 2⁻³⁰ of Σ |wᵢ ΔWᵢ| is 0: two deltas that cancel but for rounding elect no sign.
    Weights are shares here: doubling all of them changes nothing, and an entry that one delta alone has keeps its size.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    mass = sum((delta.abs() for delta in weighted[1:]), weighted[0].abs())
    votes = sum(weighted[1:], weighted[0])
    sign = votes.sign() * (votes.abs() > mass * 2**-30)
    total, shares = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = (delta.sign() == sign) & (sign != 0)
        total += delta * agrees
        shares += agrees * abs(weight)
    return total / shares.where(shares > 0, torch.ones_like(shares))


def _trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    return delta * _largest(delta, max(1, round(density * delta.numel())))


def _largest(delta: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` largest magnitudes; among equal ones those that come first in the rows."""
    if count >= delta.numel():
        return torch.ones_like(delta, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    sizes = delta.abs().reshape(-1)
    smallest = sizes.kthvalue(sizes.numel() - count + 1).values
    mask = sizes > smallest
    equal = torch.nonzero(sizes == smallest).reshape(-1)
    mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(delta.shape)


def _dare(deltas: Matrices, options: Options, draws: Draws) -> list[torch.Tensor]:
    density = options["density"]
    pairs = zip(deltas, draws, strict=True)
    return [_kept(delta, torch.full_like(delta, density), draw) / density for delta, draw in pairs]


def _kept(delta: torch.Tensor, probability: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Each entry with its probability, else 0."""
    return delta * (torch.rand(delta.shape, generator=draw, dtype=torch.float64) < probability)
