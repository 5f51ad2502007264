"""Which layers a setting names: endings of names, or all linear layers, in all blocks or in some."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.errors import TuningError
from peftkit.tuning.depth import find_blocks
from peftkit.tuning.layers import chosen_layers

Targets = str | list[str]


def targets(model: Any, wanted: Targets, layers: str) -> Targets:
    """`target_modules` for PEFT: as they are given, or the full names of those in the chosen blocks.

    PEFT finds the number of a block by a regular expression, and takes the first number in a name for it.
    """
    if layers == "all":
        return wanted
    path, blocks = find_blocks(model)
    if not blocks:
        raise TuningError(f"adapter.layers={layers} and {type(model).__name__} has no list of layers", expected="all")
    chosen = sorted(chosen_layers(layers, len(blocks)))
    found = [
        f"{path}.{index}.{name}"
        for index in chosen
        for name, module in blocks[index].named_modules()
        if is_target(name, module, wanted)
    ]
    if not found:
        raise TuningError(
            f"adapter.target_modules={wanted!r} names nothing in the layers {layers}",
            expected="all-linear, or endings of module names: " + ", ".join(linear_endings(blocks[chosen[0]])),
        )
    return found


def linear_endings(model: nn.Module) -> list[str]:
    """The last parts of the names of the modules with weights, sorted."""
    return sorted({ending(name) for name, module in model.named_modules() if hasattr(module, "weight")})


def linears_below(model: nn.Module, heads: Collection[str]) -> list[str]:
    """Full names of the linear layers that are not the head's: PEFT knows heads under two names only."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    ]


def is_target(name: str, module: nn.Module | None, wanted: Targets) -> bool:
    """Whether a setting names a module."""
    if wanted == "all-linear":
        return isinstance(module, nn.Linear | Conv1D)  # bitsandbytes' are nn.Linear too
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def ending(name: str) -> str:
    """The last part of a module's name."""
    return name.rpartition(".")[2]
