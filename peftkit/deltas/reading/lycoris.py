"""LoHa and LoKr, in linear layers and convolutions."""

from __future__ import annotations

import torch

from peftkit.deltas.delta import Added, LowRank
from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.lora import rank_of
from peftkit.deltas.reading.names import Site
from peftkit.deltas.reading.patterns import for_module
from peftkit.deltas.reading.products import Hadamard, Kronecker, whole


def read_loha(checkpoint: Checkpoint) -> None:
    """Every module's two pairs of factors; with `hada_t1` and `hada_t2` a convolution's, in Tucker form."""
    for module in checkpoint.modules("hada_w1_a"):
        site = _site(checkpoint, module)
        one, two = (_pair(checkpoint, module, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        if not one.shape == two.shape == site.matrix:
            raise checkpoint.misfit(site, one.shape, two.shape)
        checkpoint.add(site, Hadamard(site.shape, one, two, _scale(checkpoint, module)))


def read_lokr(checkpoint: Checkpoint) -> None:
    """Every module's two factors of a Kronecker product, each whole or a product itself."""
    for module in checkpoint.modules("lokr_w1", "lokr_w1_a"):
        site, scale = _site(checkpoint, module), _scale(checkpoint, module)
        first, second = checkpoint.take_if(module, "lokr_w1"), checkpoint.take_if(module, "lokr_w2")
        one = whole(first) if first is not None else _pair(checkpoint, module, "lokr_w1")
        if second is not None and second.dim() == 3:
            # A Conv1d: peft multiplies a matrix by three axes, and torch lines them up from the last one.
            dense = torch.kron(one.rows(0, one.shape[0]), second.double()).reshape(site.matrix)
            checkpoint.add(site, Added(site.shape, dense, scale))
            continue
        two = whole(second.flatten(1)) if second is not None else _pair(checkpoint, module, "lokr_w2", "lokr_t2")
        if (one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]) != site.matrix:
            raise checkpoint.misfit(site, one.shape, two.shape)
        checkpoint.add(site, Kronecker(site.shape, one, two, scale))


def _site(checkpoint: Checkpoint, module: str) -> Site:
    site = checkpoint.site(module)
    if site.layer == "conv1d":
        raise checkpoint.refuse(f"{checkpoint.config['peft_type']} of a Conv1D", "PEFT has no such layer")
    return site


def _scale(checkpoint: Checkpoint, module: str) -> float:
    """alpha / r by the module's own alpha and rank."""
    config = checkpoint.config
    return float(for_module(config.get("alpha_pattern"), module, config.get("alpha", 8)) / rank_of(config, module))


def _pair(checkpoint: Checkpoint, module: str, name: str, core: str = "") -> LowRank:
    """a @ b, or Σ core[i, j] a[i] ⊗ b[j] over a kernel, whose columns are then (in, kernel)."""
    left, right = checkpoint.take(module, f"{name}_a"), checkpoint.take(module, f"{name}_b")
    checkpoint.check_rank(module, right.shape[0], rank_of(checkpoint.config, module))
    tucker = checkpoint.take_if(module, core) if core else None
    if tucker is not None:
        right = torch.einsum("ijkl,jr->irkl", tucker.double(), right.double()).flatten(1)
        left = left.T
    return LowRank((left.shape[0], right.shape[1]), left, right)
