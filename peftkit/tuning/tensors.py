"""Kind `tensors`: named tensors that stand in for the base's own, in a skeleton of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.decide import Placement
from peftkit.backbone.quantize import dense_weight
from peftkit.errors import TuningError
from peftkit.tuning.fit import fitted
from peftkit.tuning.stored import Stored

Owner = tuple[nn.Module, str]
Changes = dict[int, tuple[nn.Module, dict[str, nn.Parameter]]]


def replace_tensors(model: nn.Module, stored: Stored, placement: Placement) -> None:
    """Put the tensors of `stored` into a skeleton.

    A 4- or 8-bit layer becomes an ordinary linear layer in the base's 16- or 32-bit dtype. The embedding of a tied
    base takes the head with it unless `lm_head.weight` is given too; `lm_head.weight` alone is a head of its own.
    Raises TuningError for names that the base does not have, and for shapes and numbers that do not fit.
    """
    tensors = fits(stored, model, placement)
    put(model, {name: nn.Parameter(t.to(placement.device), requires_grad=False) for name, t in tensors.items()})


def fits(stored: Stored, model: nn.Module, placement: Placement) -> dict[str, torch.Tensor]:
    """The tensors of `stored` in the base's dtypes.

    Raises TuningError for names that the base does not have, and for shapes and numbers that do not fit.
    """
    if not stored.tensors:
        raise TuningError(f"{stored.version.reference} holds no tensors", expected="at least one")
    owners, quantized = owned(model), {id(layer) for layer in quantized_linears(model).values()}
    needed = {}
    for name in stored.tensors.keys() & owners.keys():
        layer, key = owners[name]
        needed[name] = _dense(layer, placement) if id(layer) in quantized and key == "weight" else held(layer, key)
    return fitted(needed, stored.tensors, stored.version)


def put(model: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    """Hang these parameters into a skeleton where the base's own are: by name, in shapes that fit.

    A quantized layer whose weight is given becomes an ordinary one, and a trained bias is added behind a quantized
    layer, which would convert it in place. The embedding of a tied base takes the head with it unless the head is
    given too; the head alone is a head of its own.
    """
    owners, quantized = owned(model), {id(layer) for layer in quantized_linears(model).values()}
    first: dict[int, str] = {}
    for name, (layer, key) in owners.items():
        first.setdefault(id(held(layer, key)), name)
    changes: Changes = {}
    for name, value in values.items():
        layer, key = owners[name]
        for other, (holder, at) in owners.items():
            if other == name or (other not in values and first[id(held(holder, at))] == name):
                changes.setdefault(id(holder), (holder, {}))[1][at] = value
    _apply(model, changes, quantized)


def _apply(model: nn.Module, changes: Changes, quantized: set[int]) -> None:
    """Change the skeleton's modules in place; a quantized layer becomes another one."""
    others: dict[int, nn.Module] = {}
    for identity, (layer, values) in changes.items():
        if identity in quantized and "weight" in values:
            others[identity] = _linear(layer, values)
            continue
        if identity in quantized and values["bias"].requires_grad:
            others[identity] = Biased(layer, values["bias"])
            continue
        for key, value in values.items():
            tensors: dict[str, Any] = layer._parameters if key in layer._parameters else layer._buffers
            tensors[key] = value if tensors is layer._parameters else value.data
        _in_one_dtype(layer, values)
    for module in list(model.modules()):  # as it was: a new layer may hold the old one
        for name, child in module._modules.items():
            if id(child) in others:
                module._modules[name] = others[id(child)]


def _in_one_dtype(layer: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    """Hold the other vectors of a layer in the dtype of its trained ones: a norm's kernel takes one dtype for both."""
    trained = [value.dtype for value in values.values() if value.requires_grad]
    for key, parameter in layer._parameters.items():
        if trained and parameter is not None and key not in values and parameter.dim() == 1:
            layer._parameters[key] = nn.Parameter(parameter.to(trained[0]), requires_grad=False)


class Biased(nn.Module):  # type: ignore[misc]
    """A quantized layer with a trained bias; bitsandbytes would convert the parameter to the input's dtype."""

    def __init__(self, layer: Any, bias: nn.Parameter) -> None:
        super().__init__()
        layer._parameters["bias"] = None
        self.layer = layer
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (…, in) → (…, out), in the dtype that the layer gives."""
        out: torch.Tensor = self.layer(x)
        return out + self.bias.to(out.dtype)


def _linear(layer: Any, values: Mapping[str, nn.Parameter]) -> Any:
    """An ordinary layer with this weight, in the orientation of the base's files, and this bias or the other's."""
    weight, bias = values["weight"], values.get("bias", layer.bias)
    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features) if _transposed(layer) else None
        linear = conv or nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias if "bias" in values else nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear


def owned(model: nn.Module) -> dict[str, Owner]:
    """Every parameter and saved buffer by each of its names: the module that holds it, and its key there."""
    found: dict[str, Owner] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        saved = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        for key in [*module._parameters, *saved]:
            if held(module, key) is not None:
                found[f"{path}.{key}" if path else key] = module, key
    return found


def held(layer: nn.Module, key: str) -> Any:
    """The parameter or buffer that a module has under a key."""
    return layer._parameters[key] if key in layer._parameters else layer._buffers[key]


def unpacked(layer: Any) -> torch.Tensor:
    """The weight of a quantized layer, dequantized, in the shape and orientation of the base's module."""
    weight = dense_weight(layer)
    return weight.T.contiguous() if _transposed(layer) else weight


def _dense(layer: Any, placement: Placement) -> torch.Tensor:
    shape = (layer.in_features, layer.out_features) if _transposed(layer) else (layer.out_features, layer.in_features)
    return torch.empty(shape, dtype=placement.dtype, device="meta")


def _transposed(layer: Any) -> bool:
    """Whether a quantized layer stands for one whose weight has the shape (in, out): GPT-2's."""
    return issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
