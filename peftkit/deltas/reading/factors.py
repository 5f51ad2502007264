"""Methods other than LoRA whose ΔW is a product of two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftkit.deltas.delta import LowRank
from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.lora import low_rank
from peftkit.deltas.reading.patterns import for_module

_ADALORA_FLOOR = 1e-5  # peft adds it to the rank it divides by (tuners/adalora/layer.py)
_DELORA_FLOOR = 1e-4  # the least norm that peft divides by (tuners/delora/layer.py)


def read_adalora(checkpoint: Checkpoint) -> None:
    """ΔW = s/r · B (A ⊙ E) (arXiv 2303.10512); r is the initial rank, whatever was pruned."""
    config = checkpoint.config
    for module in checkpoint.modules("lora_A", "lora_B", "lora_E"):
        right, left = checkpoint.take(module, "lora_A"), checkpoint.take(module, "lora_B")
        values = checkpoint.take(module, "lora_E")
        alpha, rank = config.get("lora_alpha", 8), config.get("init_r", 12)
        checkpoint.check_rank(module, right.shape[0], _unpruned(config, module, rank))
        scale = (alpha if alpha > 0 else float(right.shape[0])) / (rank + _ADALORA_FLOOR)
        site = checkpoint.site(module)
        checkpoint.add(site, low_rank(checkpoint, site, left, right.double() * values.double(), float(scale)))


def _unpruned(config: Mapping[str, Any], module: str, rank: int) -> int:
    """How many ranks a module kept: its mask stands under the name of one of its tensors."""
    for name, mask in (config.get("rank_pattern") or {}).items():
        if name.startswith(f"{module}."):
            return int(sum(mask))
    return rank


def read_vera(checkpoint: Checkpoint) -> None:
    """ΔW = diag(b) B diag(d) A (arXiv 2310.11454); every layer takes its corner of the shared A and B."""
    right = checkpoint.take_named("base_model.vera_A")
    left = checkpoint.take_named("base_model.vera_B")
    if right is None or left is None:
        raise checkpoint.refuse(
            "VERA without its projections", "save_projection was false, and PEFT draws them again when it loads"
        )
    for module in checkpoint.modules("vera_lambda_b", "vera_lambda_d"):
        rows, columns = checkpoint.take(module, "vera_lambda_b"), checkpoint.take(module, "vera_lambda_d")
        site = checkpoint.site(module)
        outputs, inputs = site.wide
        scaled = rows.double()[:, None] * left[:outputs].double()
        checkpoint.add(
            site, low_rank(checkpoint, site, scaled, columns.double()[:, None] * right[:, :inputs].double(), 1.0)
        )


def read_miss(checkpoint: Checkpoint) -> None:
    """Inputs summed over blocks of r, then B: ΔW = Bᵀ [I I …] (arXiv 2409.15371); `bat` depends on the base."""
    init = checkpoint.config.get("init_weights", True)
    if init == "bat":
        raise checkpoint.refuse("MISS with init_weights='bat'", "it is computed from the base's blocks")
    for module in checkpoint.modules("miss_block"):
        block, site = checkpoint.take(module, "miss_block"), checkpoint.site(module)
        outputs, inputs = site.wide
        if init == "mini":
            block = block.repeat(1, outputs // block.shape[1])
        rank = block.shape[0]
        sums = torch.eye(rank, dtype=block.dtype).repeat(1, -(-inputs // rank))[:, :inputs]
        checkpoint.add(site, low_rank(checkpoint, site, block.T, sums, 1.0))


def read_delora(checkpoint: Checkpoint) -> None:
    """ΔW = λ/r · B diag(1/‖aᵢ‖‖bᵢ‖) A diag(w) (arXiv 2503.18225); w, the base's column norms, is in the file."""
    for module in checkpoint.modules("delora_A", "delora_B"):
        right, left = checkpoint.take(module, "delora_A").double(), checkpoint.take(module, "delora_B").double()
        bound, widths = checkpoint.take(module, "delora_lambda"), checkpoint.take(module, "delora_w_norm")
        rank = for_module(checkpoint.config.get("rank_pattern"), module, checkpoint.config.get("r", 8))
        checkpoint.check_rank(module, right.shape[0], rank)
        norms = right.norm(dim=1).clamp(min=_DELORA_FLOOR) * left.norm(dim=0).clamp(min=_DELORA_FLOOR)
        site = checkpoint.site(module)
        delta: LowRank = low_rank(checkpoint, site, left / norms, right * widths.double(), float(bound) / rank)
        checkpoint.add(site, delta)
