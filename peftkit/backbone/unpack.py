"""A quantized weight as its format defines it, worked out on the CPU without bitsandbytes' kernels."""

from __future__ import annotations

from typing import Any

import torch


def unpacked(layer: Any) -> torch.Tensor:
    """The weight of a bitsandbytes linear layer in float64 on the CPU, shape (out, in).

    4 bits: two codes a byte, the high half first, times the constant of their block, which double quantization holds
    as a code of its own (QLoRA, arXiv 2305.14314, section 3). 8 bits: codes times their row's constant over 127.
    """
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return _here(layer.weight.data) * (_here(scale).unsqueeze(1) / 127)
    packed = layer.weight.data.detach().cpu().contiguous().view(torch.uint8).flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()]
    scales = _constants(state).repeat_interleave(state.blocksize)[: codes.numel()]
    return (_here(state.code)[codes] * scales).view(state.shape)


def _constants(state: Any) -> torch.Tensor:
    """One float64 constant a block."""
    if not state.nested:
        return _here(state.absmax)
    second = state.state2
    outer = _here(second.absmax).repeat_interleave(second.blocksize)[: state.absmax.numel()]
    return _here(second.code)[state.absmax.cpu().long().flatten()] * outer + _here(state.offset)


def _here(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()
