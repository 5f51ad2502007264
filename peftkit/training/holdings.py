"""The tensors that a model, its gradients and its optimizer hold, and the parts of a language model by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from peftkit.tuning.depth import find_blocks


def held(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a model holds: parameters, buffers, and what hangs on them or on modules as attributes.

    bitsandbytes keeps the constants of 4-bit weights on the parameter and those of 8-bit weights on the module.
    """
    seen: set[int] = set()
    waiting: list[Any] = [*model.parameters(), *model.buffers(), *(vars(module) for module in model.modules())]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, torch.nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value.detach()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif type(value).__module__.split(".")[0] in ("torch", "bitsandbytes") and hasattr(value, "__dict__"):
            waiting += vars(value).values()


def gradients(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The gradients of a model's parameters, where there are any."""
    return (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def states(optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    """The tensors of an optimizer's state."""
    if optimizer is not None:
        leaves = (leaf for state in optimizer.state.values() for leaf in tree_leaves(state))
        yield from (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


class Parts:
    """Which part of a language model a module belongs to: embeddings, blocks, head, or the rest.

    Blocks are those of `tuning.depth`; embeddings and head are those that the model names.
    """

    names = ("embeddings", "blocks", "head", "rest", "outside")

    def __init__(self, model: torch.nn.Module) -> None:
        path, _ = find_blocks(model)
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = {"blocks": path} if path else {}
        for part, getter in (("embeddings", "get_input_embeddings"), ("head", "get_output_embeddings")):
            found = names.get(id(getattr(model, getter, lambda: None)()))
            if found is not None:
                self.prefixes[part] = found

    def of(self, module: str | None) -> str:
        """The part that a module's qualified name is in; `outside` for None."""
        if module is None:
            return "outside"
        inside = (part for part, prefix in self.prefixes.items() if f"{module}.".startswith(f"{prefix}."))
        return next(inside, "rest")
