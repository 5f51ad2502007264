"""A second tree of modules over the same tensors: an adapter is put into it, and the running model is not touched.

PEFT replaces children of the modules it is given, and sometimes a layer's own weight: DoRA over 8 bits sets
`module.weight` anew in every forward (peft 0.21.2, `dequantize_module_weight`). A skeleton has modules of its own and
shares every tensor with the model, so whatever is replaced is replaced in the skeleton alone. It costs 10 ms and 1 MB
of Python objects for SmolLM2-135M, and no tensor memory.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from peftkit.errors import TuningError

_CONTAINERS = (dict, OrderedDict, list, set)


def skeleton(model: nn.Module, shared: Iterable[object] = ()) -> Any:
    """A copy of `model` with modules of its own and shared tensors, quantization constants included.

    What is in `shared` stays the object that it is, wherever the model holds it.

    Raises TuningError for a model that cannot be copied this way.
    """
    # copy.deepcopy follows bound methods and partials that point into the tree; what stands in `memo` stays itself.
    memo: dict[int, Any] = {id(value): value for value in shared}
    for module in model.modules():
        if not module._modules:
            memo[id(module)] = _twin_of_layer(module)
        kept = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        memo |= {id(tensor): tensor for tensor in [*_own_tensors(module), *kept]}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # a lock, a handle, a generator: nothing in transformers' decoders has one
        raise TuningError(
            f"{type(model).__name__} holds something that cannot be copied: {error}",
            expected="a model whose modules can be copied while their tensors are shared",
        ) from error
    if _tensor_ids(model) != _tensor_ids(twin):
        raise TuningError(
            f"{type(model).__name__} builds tensors of its own when it is copied",
            expected="a model whose modules can be copied while their tensors are shared",
        )
    return twin


def places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Where every parameter and buffer hangs: the dictionary, the key, and the tensor."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield held, name, tensor


def _twin_of_layer(layer: nn.Module) -> Any:
    """A layer of the same class with the same tensors and state, whose parameters can be replaced."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(
        {name: type(value)(value) if type(value) in _CONTAINERS else value for name, value in vars(layer).items()}
    )
    return twin


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    held = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None]


def _tensor_ids(model: nn.Module) -> list[int]:
    return [id(tensor) for _, _, tensor in places(model)]
