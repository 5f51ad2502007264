"""Where an adapter begins, where that is not PEFT's own: PiSSA, LoftQ, EVA, and virtual tokens.

PEFT's versions of the first two rewrite the base's weights. Here the base stays, and the factors say the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.load import Backbone
from peftkit.backbone.quantize import dense_weight
from peftkit.errors import TuningError

NAME = "default"
"""PEFT's name of the one adapter in a model."""
_EXACT = 512
"""Widths up to here are decomposed exactly; svd_lowrank took a tenth of the time for a matrix of 576 × 1536."""


def lora_layers(model: Any, method: str) -> dict[str, Any]:
    """PEFT's LoRA layers by name. Raises TuningError where one stands on an embedding, whose factors lie otherwise."""
    found = {name: module for name, module in model.named_modules() if NAME in getattr(module, "lora_A", {})}
    tables = [name for name, module in model.named_modules() if NAME in getattr(module, "lora_embedding_A", {})]
    if tables:
        raise TuningError(
            f"adapter.method={method} is for linear layers, and adapter.target_modules names the embedding {tables[0]}",
            expected="linear layers",
            hint="adapter.target_modules=all-linear",
        )
    return found


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_A of shape (r, in) and lora_B of shape (out, r)."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def held_weight(layer: Any) -> torch.Tensor:
    """The weight that a LoRA layer's base computes with, shape (out, in), float32."""
    base = layer.get_base_layer()
    if quantized_linears(nn.ModuleList([base])):
        weight = dense_weight(base)
    else:
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    return weight.detach().float()


def leading(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U√S of shape (out, r) and √SVᵀ of shape (r, in): the best product of rank r (Eckart and Young 1936).

    Large matrices are decomposed by subspace iteration (Halko et al. 2009, algorithm 4.4), with torch's generator.
    """
    if min(matrix.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * r + 16, *matrix.shape), niter=6)
        vh = v.T
    root = s[:r].sqrt()
    return (u[:, :r] * root).float(), (root[:, None] * vh[:r]).float()


def check_rank(name: str, matrix: torch.Tensor, r: int) -> None:
    """Raise TuningError for a rank that a matrix of this shape does not have."""
    if r > min(matrix.shape):
        raise TuningError(
            f"adapter.r={r}, and {name} of shape {tuple(matrix.shape)} has {min(matrix.shape)} directions",
            expected=f"at most {min(matrix.shape)}",
        )


def common_tokens(backbone: Backbone, count: int, seed: int) -> list[int]:
    """Ids drawn with a seed, without repetition, from the first 5000 of the vocabulary.

    Lester et al. (2021, section 3.2) draw from the 5000 most common tokens; merges are numbered from the most common.
    """
    tokenizer = backbone.tokenizer
    special = {int(i) for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    plain = [i for i in range(min(len(tokenizer.hf), 5000 + len(special))) if i not in special]
    if count > len(plain):
        raise TuningError(
            f"adapter.num_virtual_tokens={count} is more than the {len(plain)} tokens to begin with",
            expected=f"at most {len(plain)}",
        )
    drawn = torch.randperm(len(plain), generator=torch.Generator().manual_seed(seed))
    return [plain[i] for i in drawn[:count].tolist()]


def written(parameter: nn.Parameter, values: Sequence[torch.Tensor] | torch.Tensor) -> None:
    """Put numbers into a parameter, in its dtype and on its device."""
    with torch.no_grad():
        parameter.copy_(values if isinstance(values, torch.Tensor) else torch.cat(list(values)))
