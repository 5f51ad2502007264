"""LoftQ: an adapter that begins with what quantization took (Li et al. 2023, arXiv 2310.08659).

One round: A and B are the best product of rank r for W − q(W), W from the base's files. Its further rounds quantize
W − AB again, which would be another base. The adapter belongs to the quantized weights: on the original ones its
beginning would be an error of the same size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.converted import tensor_of
from peftkit.backbone.load import Backbone
from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.ref import read_config
from peftkit.errors import TuningError
from peftkit.events import Note, Report, silent
from peftkit.tuning.initial import check_rank, factors, held_weight, leading, lora_layers, written


def begin_loftq(model: Any, backbone: Backbone, r: int, report: Report = silent) -> None:
    """Fill a LoRA with the leading part of every layer's quantization error.

    A layer that is not quantized, such as the head, has none and begins as LoRA does: with zeros for both factors
    neither would ever get a gradient. Raises TuningError where no layer is quantized, where the files hold quantized
    weights only, or no tensor for a layer alone.
    """
    if read_config(backbone.base.folder).get("quantization_config"):
        raise TuningError(
            f"adapter.method=loftq needs the weights before quantization, and the files of {backbone.base.source} "
            "hold quantized ones",
            expected="a base with 16- or 32-bit files",
            hint="adapter.method=lora",
        )
    files, names = dense_tensors(backbone.base.folder), _names(backbone.model)
    layers = lora_layers(model, "loftq")
    repaired = {name: layer for name, layer in layers.items() if _is_quantized(layer)}
    if not repaired:
        raise TuningError(
            f"adapter.method=loftq repairs the error of quantization, and none of the {len(layers)} adapted layers is "
            f"quantized: {', '.join(name.removeprefix('base_model.model.') for name in list(layers)[:3])}",
            expected="quantized layers among adapter.target_modules",
            hint="adapter.target_modules=all-linear, or adapter.method=lora",
        )
    before = after = 0.0
    for name, layer in repaired.items():
        held = held_weight(layer)
        check_rank(name, held, r)
        lost = _original(layer, names[id(layer.get_base_layer())], backbone, files).to(held.device) - held
        left, right = leading(lost, r)
        scale = layer.scaling["default"] ** 0.5
        a, b = factors(layer)
        written(a, right / scale)
        written(b, left / scale)
        before += float(lost.square().sum())
        after += float((lost - left @ right).square().sum())
    ratio = (after / before) ** 0.5 if before else 0.0
    plain = len(layers) - len(repaired)
    rest = f"; {plain} layers that are not quantized begin as LoRA's do" if plain else ""
    report(
        Note(f"of the weights' quantization error {ratio:.1%} is left{rest}; the adapter belongs to {backbone.label}")
    )


def _is_quantized(layer: Any) -> bool:
    return bool(quantized_linears(nn.ModuleList([layer.get_base_layer()])))


def _names(model: Any) -> dict[int, str]:
    """Modules of the base by identity → names without PEFT's layers, which stand around them already."""
    return {id(module): name.removesuffix(".base_layer") for name, module in model.named_modules()}


def _original(layer: Any, module: str, backbone: Backbone, files: dict[str, Dense]) -> torch.Tensor:
    """The weight as it lies in the base's files, shape (out, in), float32."""
    name = tensor_of(module, backbone.model.base_model_prefix, files)
    if name is None:
        raise TuningError(
            f"adapter.method=loftq: the base's files have no tensor for {module} alone",
            expected="one tensor for each linear layer",
            hint="leave it out of adapter.target_modules, or adapter.method=lora",
        )
    weight = torch.from_numpy(files[name].part().astype("float32")).reshape(files[name].shape)
    return weight.T if issubclass(getattr(layer.get_base_layer(), "source_cls", object), Conv1D) else weight
