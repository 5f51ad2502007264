"""PiSSA beside an untouched base: the update of the weight's principal part, as a LoRA of twice the rank.

PiSSA (Meng et al. 2024, arXiv 2404.02948) trains the top singular directions of a weight and freezes the rest of it.
Here the weight stays whole, and the adapter is ΔW = s (B A − B0 A0) = s [B, −B0] [A; A0]: the first half is trained
from A0, B0, the second half stays. Over 4 and 8 bits PiSSA's second gain is lost: it quantizes W − s B0 A0 in the place
of W, with .186 to .891 of the error, and would need weights of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkit.tuning.initial import check_rank, factors, held_weight, leading, lora_layers, written


def begin_pissa(model: Any, r: int) -> None:
    """Fill a LoRA of rank 2r with [A0; A0] and [B0, −B0], whose product is zero to rounding; freeze second halves."""
    for name, layer in lora_layers(model, "pissa").items():
        weight = held_weight(layer)
        check_rank(name, weight, r)
        left, right = leading(weight, r)
        scale = layer.scaling["default"] ** 0.5
        a, b = factors(layer)
        written(a, torch.cat([right, right]) / scale)
        written(b, torch.cat([left, -left], dim=1) / scale)
    freeze_halves(model)


def freeze_halves(model: Any) -> None:
    """Let no gradient reach the second half of the ranks; Adam leaves a number without a gradient bit for bit."""
    for layer in lora_layers(model, "pissa").values():
        a, b = factors(layer)
        r = a.shape[0] // 2
        _hold(a, (slice(r, None), slice(None)))
        _hold(b, (slice(None), slice(r, None)))


def _hold(parameter: nn.Parameter, part: tuple[slice, slice]) -> None:
    def without(gradient: torch.Tensor) -> torch.Tensor:
        kept = gradient.clone()
        kept[part] = 0
        return kept

    parameter.register_hook(without)
