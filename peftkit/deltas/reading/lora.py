"""LoRA and what PEFT makes of it: rsLoRA, patterns, biases, DoRA, embeddings, convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from peftkit.deltas.delta import Added, Delta, LowRank
from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.experts import nested, read_experts
from peftkit.deltas.reading.kinds import Dora
from peftkit.deltas.reading.names import Site
from peftkit.deltas.reading.patterns import for_module

# Settings with which the factors are not all that there is.
_REFUSED = {
    "alora_invocation_tokens": "it acts only on the tokens after its invocation",
    "arrow_config": "it routes every token between other adapters",
    "kasa_config": "PEFT truncates the base's weights when it loads it",
    "layer_replication": "it repeats layers of the base",
    "monteclora_config": "its factors are means of what it samples",
    "use_bdlora": "its factors are blocks of a diagonal",
    "use_qalora": "it acts on groups of inputs of a GPTQ base",
    "velora_config": "it keeps more than its factors",
}
# These choose only where a training starts; with any other, PEFT rewrites the base's weights when it loads.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_lora(checkpoint: Checkpoint) -> None:
    """Every pair of factors with its magnitude and bias. Raises DeltaError for settings that are more than that."""
    _check(checkpoint)
    for module in nested(checkpoint):
        read_experts(checkpoint, module, scaling, rank_of)
    for module in checkpoint.modules("lora_A.weight", "lora_B.weight"):
        site, scale = checkpoint.site(module), scaling(checkpoint.config, module)
        right, left = checkpoint.take(module, "lora_A.weight"), checkpoint.take(module, "lora_B.weight")
        checkpoint.check_rank(module, right.shape[0], rank_of(checkpoint.config, module))
        _add(checkpoint, site, low_rank(checkpoint, site, left, right, scale))
        bias = checkpoint.take_if(module, "lora_B.bias")
        if bias is not None:
            add_bias(checkpoint, module, bias, scale)
    for module in checkpoint.modules("lora_embedding_A", "lora_embedding_B"):
        site, scale = checkpoint.site(module), scaling(checkpoint.config, module)
        right, left = checkpoint.take(module, "lora_embedding_A"), checkpoint.take(module, "lora_embedding_B")
        checkpoint.check_rank(module, right.shape[0], rank_of(checkpoint.config, module))
        site = replace(site, place=replace(site.place, layer="embedding"))
        if (right.shape[1], left.shape[0]) != site.matrix or left.shape[1] != right.shape[0]:
            raise checkpoint.misfit(site, left.shape, right.shape)
        _add(checkpoint, site, LowRank(site.shape, right.T, left.T, scale))


def scaling(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha / r, or lora_alpha / √r for rsLoRA (arXiv 2312.03732), by the module's own alpha and rank."""
    rank = rank_of(config, module)
    alpha = for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that the configuration gives a module."""
    return int(for_module(config.get("rank_pattern"), module, config.get("r", 8)))


def low_rank(checkpoint: Checkpoint, site: Site, left: torch.Tensor, right: torch.Tensor, scale: float) -> LowRank:
    """left (out, r) @ right (r, in) in the orientation of the file. Raises DeltaError when they do not fit it."""
    given = left.shape, right.shape
    left, right = left.flatten(1), right.flatten(1)  # a convolution's right factor has its kernel, the left one is 1x1
    if site.layer == "conv1d":
        left, right = right.T, left.T
    if (left.shape[0], right.shape[1]) != site.matrix or left.shape[1] != right.shape[0]:
        grouped = site.layer == "conv" and right.shape[1] > site.matrix[1] and right.shape[1] % site.matrix[1] == 0
        if grouped:
            raise checkpoint.refuse("LoRA of a grouped convolution", f"{site.tensor} has no ΔW of its shape")
        raise checkpoint.misfit(site, *given)
    return LowRank(site.shape, left, right, scale)


def add_bias(checkpoint: Checkpoint, module: str, bias: torch.Tensor, scale: float = 1.0) -> None:
    """Note a change of a layer's bias of shape (out,). Raises DeltaError when the base's layer has none."""
    site = checkpoint.site(module, "bias")
    if site.shape != tuple(bias.shape):
        raise checkpoint.misfit(site, bias.shape)
    checkpoint.add(site, Added(site.shape, bias[None], scale))


def _add(checkpoint: Checkpoint, site: Site, low: LowRank) -> None:
    """Note factors, or DoRA where the module has a magnitude."""
    magnitude = checkpoint.take_if(site.place.module, "lora_magnitude_vector")
    if magnitude is None:
        if checkpoint.config.get("use_dora"):
            checkpoint.take(site.place.module, "lora_magnitude_vector")
        checkpoint.add(site, low)
        return
    by_column = site.layer in ("conv1d", "embedding")
    delta: Delta = Dora(site.shape, low, magnitude.flatten(), by_column)
    if magnitude.numel() != site.matrix[1 if by_column else 0]:
        raise checkpoint.misfit(site, magnitude.shape)
    checkpoint.add(site, delta)


def _check(checkpoint: Checkpoint) -> None:
    for key, why in _REFUSED.items():
        if checkpoint.config.get(key):
            raise checkpoint.refuse(f"LoRA with {key}", why)
    init = checkpoint.config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise checkpoint.refuse(
            f"LoRA with init_lora_weights={init!r}", "PEFT rewrites the base's weights by it when it loads"
        )
