"""How a step's rows go through the model, as far as its config says; `training.passes.trying` tries the model."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit.planning.architecture import Architecture
from peftkit.planning.setting import Setting

_PADDED = frozenset({"falcon", "stablelm"})
"""Families whose attention is not told where rows begin, or adds what depends on columns."""
_FUSED = frozenset({"lora", "rslora", "lora_plus", "pissa", "loftq", "eva"})
"""Methods whose layers compute base + s · B(A(x)) and nothing else."""
_VIRTUAL = frozenset({"prompt_tuning", "prefix_tuning"})


@dataclass(frozen=True)
class Passes:
    """The shortcuts that passes take; without arguments the model's own way."""

    flat: bool = False
    """Rows lie one behind the other, without padding and without a mask."""
    scores_labels: bool = False
    """The head sees labelled tokens alone, a chunk at a time."""
    fused: bool = False
    """LoRA's products and their sum are one operation."""


def training_passes(architecture: Architecture, setting: Setting) -> Passes:
    """The shortcuts of a run's training steps."""
    if setting.passes == "plain" or setting.method in _VIRTUAL:
        return Passes()
    fused = setting.method in _FUSED and not setting.lora_dropout
    if architecture.task:
        return Passes(fused=fused)
    side_by_side = setting.passes == "padded" or setting.trunk_cache or setting.row_copies > 1
    beyond = bool(architecture.sliding_layers) and setting.longest > architecture.window
    eager = setting.attention == "eager" or architecture.softcapped
    flat = not side_by_side and not beyond and not eager and architecture.model_type not in _PADDED
    return Passes(flat, scores_labels=setting.row_copies == 1, fused=fused)
