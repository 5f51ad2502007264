"""How deep every parameter of a model lies: embeddings, then the blocks, then the head.

Found from the structure: the blocks are the model's own list of layers, and what stands before and behind them is
told by where the model says that its embeddings are and by the order in which its modules were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_SCALES = ("ia3_l",)
"""Vectors of PEFT that multiply, held as matrices of one row: their neutral value is 1, and decay pulls towards 0."""


@dataclass(frozen=True)
class Depths:
    """The depth of every parameter: 0 the embeddings, 1 to `top` - 1 the blocks, `top` what stands behind them."""

    of: Mapping[str, int]
    """By every name of `named_parameters`; a tensor with two names has one depth, the lower one."""
    blocks: tuple[nn.Module, ...]
    path: str
    """Qualified name of the list of blocks; empty where there is none."""

    @property
    def top(self) -> int:
        """The depth of the head: the number of blocks and one."""
        return len(self.blocks) + 1

    def label(self, depth: int) -> str:
        """What a depth is called: embeddings, block 0 and so on, head."""
        return "embeddings" if depth == 0 else "head" if depth == self.top else f"block {depth - 1}"


def depths(model: Any) -> Depths:
    """Sort the parameters of a transformers model, PEFT's layers in it or not, by depth.

    Embeddings are all that stands before the blocks (tokens, positions, their norm) and what PEFT puts before the
    model (prompts); the head is all that stands behind them (final norm, pooler, head). A model without a list of
    layers has no blocks; one of encoder and decoder has those of the part with more numbers in it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = next(name for name, module in model.named_modules() if module is inner)
    inside = f"{own}." if own else ""
    path, blocks = find_blocks(inner)
    before = _Before(inner, path)
    named = dict(model.named_parameters(remove_duplicate=False))
    lowest: dict[int, int] = {}
    for name, parameter in named.items():
        outside = not name.startswith(inside)
        depth = 0 if outside else _depth(name.removeprefix(inside), path, len(blocks), before)
        lowest[id(parameter)] = min(depth, lowest.get(id(parameter), depth))
    of = {name: lowest[id(parameter)] for name, parameter in named.items()}
    return Depths(of, blocks, f"{inside}{path}" if path else "")


def find_blocks(model: Any) -> tuple[str, tuple[nn.Module, ...]]:
    """Qualified name and items of a model's list of layers: the outermost ModuleList of `config.num_hidden_layers`
    items, or else the outermost one with the most numbers in it; ("", ()) where there is no list.

    A mixture of experts has longer lists inside its blocks, and an image model none of the configured length.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inner:
            lists[name] = module
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = getattr(config, "num_hidden_layers", None)
    fitting = {name: found for name, found in lists.items() if len(found) == wanted} or lists
    if not fitting:
        return "", ()
    path = max(fitting, key=lambda name: sum(parameter.numel() for parameter in fitting[name].parameters()))
    return path, tuple(fitting[path])


def decaying(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Names of those of a model's tensors that may be pulled towards 0: weight decay, L1 and L2 are for them alone."""
    modules = dict(model.named_modules())
    return frozenset(name for name, tensor in tensors.items() if decays(name, modules[name.rpartition(".")[0]], tensor))


def decays(name: str, module: nn.Module, parameter: torch.Tensor) -> bool:
    """Whether weight decay is for this parameter, which hangs on `module`: for matrices alone.

    Not for biases, norms and other tensors of fewer than two dimensions (Loshchilov and Hutter's decay pulls towards
    0, and a norm's neutral value is 1), nor for PEFT's vectors that multiply.
    """
    scales = any(part in _SCALES for part in name.split("."))
    bias = name.rpartition(".")[2] == "bias"
    return parameter.ndim >= 2 and not bias and not scales and not isinstance(module, _NORMS)


def _depth(name: str, path: str, count: int, before: _Before) -> int:
    if path and name.startswith(f"{path}."):
        return int(name.removeprefix(f"{path}.").partition(".")[0]) + 1
    return 0 if name in before else count + 1


class _Before:
    """Which parameters outside of the blocks stand before them."""

    def __init__(self, model: Any, path: str) -> None:
        self.embeddings = _around(_path_of(model, "get_input_embeddings"), path)
        self.head = _path_of(model, "get_output_embeddings")
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        start = next((at for at, name in enumerate(names) if path and name.startswith(f"{path}.")), 0)
        self.earlier = set(names[:start]) - _misplaced_norm(model, path, self.embeddings)

    def __contains__(self, name: str) -> bool:
        if _under(name, self.embeddings):
            return True
        return name in self.earlier and not _under(name, self.head)


def _path_of(model: Any, getter: str) -> str | None:
    """Qualified name of what a getter of transformers gives; None where the model has nothing to give."""
    try:
        found = getattr(model, getter, lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def _around(embeddings: str | None, path: str) -> str | None:
    """The outermost module around the embeddings that does not hold the blocks: BERT's `embeddings`, with its norm."""
    if not embeddings:
        return None
    parts = embeddings.split(".")
    outer = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return next((name for name in outer if not path.startswith(f"{name}.")), embeddings) if path else embeddings


def _misplaced_norm(model: Any, path: str, embeddings: str | None) -> set[str]:
    """The final norm of a model that makes it before its blocks: OPT. Nothing else stands behind the blocks there."""
    parent, _, own = path.rpartition(".")
    siblings = dict(model.get_submodule(parent).named_children()) if path else {}
    order = [name for name, module in siblings.items() if any(True for _ in module.parameters())]
    at = order.index(own) if own in order else -1
    if at != len(order) - 1 or at < 1:
        return set()
    inside = f"{parent}." if parent else ""
    last = order[at - 1]
    parameters = dict(siblings[last].named_parameters())
    norm = all(parameter.ndim == 1 for parameter in parameters.values())
    return {f"{inside}{last}.{name}" for name in parameters} if norm and f"{inside}{last}" != embeddings else set()


def _under(name: str, prefix: str | None) -> bool:
    return prefix is not None and name.startswith(f"{prefix}.")
