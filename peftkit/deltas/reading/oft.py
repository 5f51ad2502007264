"""OFT: blocks of inputs are turned."""

from __future__ import annotations

import math

import torch

from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.names import Site
from peftkit.deltas.reading.rotation import Rotated, cayley, cayley_series, projected, skew


def read_oft(checkpoint: Checkpoint) -> None:
    """Every module's rotation as peft 0.21.2 computes it: x R before the layer, or after an embedding."""
    for module in checkpoint.modules("oft_R.weight"):
        site = checkpoint.site(module)
        if site.layer == "conv" and math.prod(site.shape[2:]) > 1:
            why = "PEFT turns overlapping patches and adds them up, which no kernel of its size does"
            raise checkpoint.refuse("OFT of a convolution larger than 1x1", why)
        blocks = _blocks(checkpoint, site, checkpoint.take(module, "oft_R.weight"), site.wide[1])
        by_rows = site.layer == "conv1d"  # (in, out): R @ W; otherwise W @ Rᵀ
        checkpoint.add(site, Rotated(site.shape, blocks if by_rows else blocks.transpose(1, 2), by_rows))
    for module in checkpoint.modules("oft_embedding_R.weight"):
        site = checkpoint.site(module)
        weight = checkpoint.take(module, "oft_embedding_R.weight")
        checkpoint.add(site, Rotated(site.shape, _blocks(checkpoint, site, weight, site.matrix[1])))


def _blocks(checkpoint: Checkpoint, site: Site, weight: torch.Tensor, turned: int) -> torch.Tensor:
    """The rotations (number, b, b), float64, from a weight of shape (number or 1, b(b-1)/2)."""
    config = checkpoint.config
    extent = (1 + math.isqrt(1 + 8 * weight.shape[1])) // 2
    number = turned // extent
    shared = bool(config.get("block_share"))
    if extent * (extent - 1) // 2 != weight.shape[1] or number * extent != turned:
        raise checkpoint.misfit(site, weight.shape)
    if weight.shape[0] != (1 if shared else number):
        raise checkpoint.misfit(site, weight.shape)
    matrices = skew(weight, extent)
    if config.get("coft"):
        matrices = projected(matrices, config.get("eps", 6e-5))
    series = config.get("use_cayley_neumann", True)
    blocks = cayley_series(matrices, config.get("num_cayley_neumann_terms", 5)) if series else cayley(matrices)
    return blocks.expand(number, extent, extent)
