"""One tensor to 4 bits and back, and what quantization costs in bits per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkit.backbone.bnb import functional as bnb
from peftkit.backbone.contain import quantized_linears
from peftkit.errors import BackboneError

BLOCK = 64


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bits: `packed` is uint8 of shape ((numel + 1) // 2, 1), `state` is bitsandbytes' QuantState."""

    packed: torch.Tensor
    state: Any


def quantize(weight: torch.Tensor, quant_type: str = "nf4", double_quant: bool = True) -> Quantized:
    """Quantize a float matrix of shape (out, in) to 4 bits in blocks of 64. Raises BackboneError for other shapes."""
    if weight.dim() != 2:
        raise BackboneError(f"a tensor of shape {tuple(weight.shape)} cannot be quantized", expected="a matrix")
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type
    )
    return Quantized(packed, state)


def dequantize(weight: Quantized) -> torch.Tensor:
    """The float matrix that a 4-bit weight stands for, in the dtype it was quantized from.

    Raises BackboneError on a CPU for widths that are multiples of 16 and not of 64: bitsandbytes 0.50.2 returns wrong
    numbers for those there.
    """
    check_width(weight.state.shape[-1], weight.packed.device.type)
    return bnb.dequantize_4bit(weight.packed, weight.state)


def check_width(columns: int, device: str) -> None:
    """Raise BackboneError for a width that bitsandbytes 0.50.2 dequantizes wrongly on a device of this type."""
    if device == "cpu" and columns % 16 == 0 and columns % BLOCK != 0:
        raise BackboneError(
            f"bitsandbytes dequantizes a matrix with {columns} columns wrongly on a CPU",
            expected=f"a width that is a multiple of {BLOCK}, or a CUDA device",
        )


def dense_weight(module: Any) -> torch.Tensor:
    """The weight that a bitsandbytes linear layer computes with, shape (out, in), float."""
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        return dequantize(Quantized(module.weight.data, state))
    scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return module.weight.data.to(torch.float32) * (scale.to(torch.float32).unsqueeze(1) / 127.0)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the quantized linear layers, and of everything else, as they lie in memory."""

    linear_parameters: int
    linear_bytes: int
    other_parameters: int
    other_bytes: int

    @property
    def bits_per_linear_parameter(self) -> float:
        """Bits per weight of the linear layers, constants included; 0 when none is quantized."""
        return 8 * self.linear_bytes / self.linear_parameters if self.linear_parameters else 0.0


def footprint(model: nn.Module) -> Footprint:
    """Measure a loaded backbone's weights; the fixed 16- and 256-entry code tables are not counted."""
    linears = quantized_linears(model)
    quantized_ids = {id(module.weight) for module in linears.values()}
    linear_parameters = linear_bytes = 0
    for module in linears.values():
        linear_parameters += module.in_features * module.out_features
        linear_bytes += _bytes(module.weight) + _constants(module)
    others = [p for p in model.parameters() if id(p) not in quantized_ids and not p.requires_grad]
    return Footprint(linear_parameters, linear_bytes, sum(p.numel() for p in others), sum(_bytes(p) for p in others))


def _constants(module: Any) -> int:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        scale = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
        return _bytes(scale) if scale is not None else 0
    nested = _bytes(state.state2.absmax) + _bytes(state.offset) if state.nested else 0
    return _bytes(state.absmax) + nested


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())
