"""A model spread over processes by FSDP2, each of which holds a part of every parameter.

Layers are gathered one at a time as they are used. 4-bit weights are bytes, and FSDP takes parts of floating-point
parameters only, so the same bytes are held as float32 numbers (`bnb_4bit_quant_storage` upstream): nothing computes
with those numbers, and what is dequantized from them is bitwise what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from peftkit.backbone.bnb import Linear4bit
from peftkit.errors import BackboneError


def shard(model: Any, device: torch.device, processes: int, *, reshard: bool = True) -> None:
    """Spread the parameters of `model`, which every process holds whole, over all processes; in place.

    Each decoder layer is a unit that is gathered for its forward and its backward pass (kept in between without
    `reshard`); embeddings, the last norm and the head stay gathered within a step. Raises BackboneError when the
    model does not say what its layers are.
    """
    if isinstance(model, FSDPModule):
        return
    kinds = getattr(model, "_no_split_modules", None) or []
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} does not say which of its modules are layers (`_no_split_modules`)",
            expected="an architecture that FSDP can shard layer by layer",
            hint="start it with DDP: accelerate launch --multi_gpu",
        )
    hold_packed_bytes_as(torch.float32, model)
    mesh = init_device_mesh(device.type, (processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    for module in model.modules():
        if "hf_device_map" in vars(module):  # where it was loaded; accelerate refuses 4-bit models that lie elsewhere
            module.hf_device_map = {"": device}


def hold_packed_bytes_as(dtype: torch.dtype, model: nn.Module) -> int:
    """Hold every packed 4-bit weight as numbers of `dtype`, the bytes as they are; return how many were changed."""
    changed = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.dtype != dtype:
            weight = module.weight
            weight.data = weight.data.view(torch.uint8).flatten().view(dtype).view(-1, 1)
            weight.quant_storage = module.quant_storage = dtype
            changed += 1
    return changed


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes; all of them must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of `value`, which every process holds, spread like `parameter` if that is spread."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
