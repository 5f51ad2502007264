"""Kind `tensors`: named tensors that stand in for the base's own, in a skeleton of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.decide import Placement
from peftkit.errors import TuningError
from peftkit.tuning.fit import fitted
from peftkit.tuning.stored import Stored

Owner = tuple[nn.Module, str]
Changes = dict[int, tuple[nn.Module, dict[str, torch.Tensor]]]


def replace_tensors(model: nn.Module, stored: Stored, placement: Placement) -> None:
    """Put the tensors of `stored` into a skeleton.

    A 4- or 8-bit layer becomes an ordinary linear layer in the base's 16- or 32-bit dtype. The embedding of a tied
    base takes the head with it unless `lm_head.weight` is given too; `lm_head.weight` alone is a head of its own.
    Raises TuningError for names that the base does not have, and for shapes and numbers that do not fit.
    """
    if not stored.tensors:
        raise TuningError(f"{stored.version.reference} holds no tensors", expected="at least one")
    owners, quantized = _owners(model), {id(layer) for layer in quantized_linears(model).values()}
    needed = {}
    for name in stored.tensors.keys() & owners.keys():
        layer, key = owners[name]
        needed[name] = _dense(layer, placement) if id(layer) in quantized and key == "weight" else _held(layer, key)
    first: dict[int, str] = {}
    for name, (layer, key) in owners.items():
        first.setdefault(id(_held(layer, key)), name)
    changes: Changes = {}
    for name, tensor in fitted(needed, stored.tensors, stored.version).items():
        value = nn.Parameter(tensor.to(placement.device), requires_grad=False)
        for other, (layer, key) in owners.items():
            if other == name or (other not in stored.tensors and first[id(_held(layer, key))] == name):
                changes.setdefault(id(layer), (layer, {}))[1][key] = value
    _apply(model, changes, quantized)


def _apply(model: nn.Module, changes: Changes, quantized: set[int]) -> None:
    """Change the skeleton's modules in place; a quantized layer whose weight is given becomes another one."""
    linears: dict[int, nn.Module] = {}
    for identity, (layer, values) in changes.items():
        if identity in quantized and "weight" in values:
            linears[identity] = _linear(layer, values)
            continue
        for key, value in values.items():
            held: dict[str, Any] = layer._parameters if key in layer._parameters else layer._buffers
            held[key] = value if held is layer._parameters else value.data
    for module in model.modules():
        for name, child in module._modules.items():
            if id(child) in linears:
                module._modules[name] = linears[id(child)]


def _linear(layer: Any, values: dict[str, torch.Tensor]) -> nn.Linear:
    """An ordinary layer with this weight of shape (out, in), and this bias or the quantized layer's."""
    weight, bias = values["weight"], values.get("bias", layer.bias)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear


def _owners(model: nn.Module) -> dict[str, Owner]:
    """Every parameter and saved buffer by each of its names."""
    found: dict[str, Owner] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        saved = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        for key in [*module._parameters, *saved]:
            if _held(module, key) is not None:
                found[f"{path}.{key}" if path else key] = module, key
    return found


def _held(layer: nn.Module, key: str) -> Any:
    return layer._parameters[key] if key in layer._parameters else layer._buffers[key]


def _dense(layer: Any, placement: Placement) -> torch.Tensor:
    return torch.empty(layer.out_features, layer.in_features, dtype=placement.dtype, device="meta")
