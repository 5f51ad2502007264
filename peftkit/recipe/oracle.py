"""Is what a device computes right: its gradients against the same model without bitsandbytes, PEFT or the device.

The twin is a copy of the model on the CPU whose adapted layers are plain float64 products of the unpacked weights. How
far 16- or 32-bit arithmetic may be from it depends on the base: SmolLM2-135M carries 22,000 in a residual stream that
ends at 42, so that float32 loses five digits. The bound is therefore not a constant: the twin is run in the dtype
itself, on the CPU, and the device may err four times as much.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.unpack import unpacked
from peftkit.data.chat import Example
from peftkit.generation.forward import autocast, pad
from peftkit.recipe.verdict import Check, held
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import lengths
from peftkit.training.passes.trying import find_paths
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned

CPU = torch.device("cpu")
TIMES = 4
"""How much more than the twin in the same dtype a device may err: it adds up in another order, as one draw of many."""
NUDGE = 0.02
"""Deviation of lora_B in the check: at zero, as it starts, lora_A has no gradient."""
BYTES_PER_PARAMETER = 12
"""Host memory that a float64 twin takes, and some room."""
PLANTED = "a planted error"
_UNIT = "relative error"


class Product(nn.Module):  # type: ignore[misc]
    """A linear layer and its adapter written down: x Wᵀ + b + s · x Aᵀ Bᵀ."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        name, base = layer.active_adapters[0], layer.base_layer
        quantized = hasattr(base.weight, "quant_state") or hasattr(base, "state")
        weight = unpacked(base) if quantized else base.weight.detach().cpu().double()
        self.register_buffer("weight", weight.T if getattr(layer, "fan_in_fan_out", False) else weight)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().cpu().double())
        self.lora_A = nn.Parameter(layer.lora_A[name].weight.detach().cpu().double())
        self.lora_B = nn.Parameter(layer.lora_B[name].weight.detach().cpu().double())
        self.scaling = layer.scaling[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (…, in)."""
        update = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)
        return nn.functional.linear(x, self.weight, self.bias) + self.scaling * update


@dataclass(frozen=True)
class Passes:
    """What a model computes for some rows: float64 on the CPU."""

    gradients: dict[str, torch.Tensor]
    """By layer and factor, such as `model.layers.0.self_attn.q_proj.lora_A`."""
    logits: torch.Tensor
    """In training mode, all rows at once; shape (rows, tokens, vocabulary)."""


def twin(tuned: Tuned) -> Any:
    """The model in float64 on the CPU; nothing of it goes through bitsandbytes or PEFT."""
    base = tuned.inner
    # deepcopy takes what it finds in `memo` for a copy that was made already.
    memo: dict[int, Any] = {id(layer): Product(layer) for layer in adapted(tuned).values()}
    made = copy.deepcopy(base, memo)
    if made.config._attn_implementation == "flash_attention_2":
        made.set_attn_implementation("sdpa")
    return nn.Module.to(made, CPU, torch.float64)  # transformers' own `to` refuses what was quantized


def adapted(tuned: Tuned) -> dict[str, Any]:
    """The layers with an adapter, by their name in the base."""
    modules = tuned.inner.named_modules()
    return {name: module for name, module in modules if hasattr(module, "lora_A") and hasattr(module, "base_layer")}


def label_of(tuned: Tuned) -> str:
    """How the weights are held and what is computed in: `nf4+dq, bfloat16`."""
    compute = str(tuned.backbone.placement.compute_dtype).removeprefix("torch.")
    return f"{tuned.backbone.quant.label}, {compute}"


def nudge(tuned: Tuned) -> None:
    """Give lora_B values other than zero, the same ones on every device."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in tuned.trainable.items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * NUDGE)


def distance(found: Passes, reference: Passes) -> float:
    """‖g − g₀‖ / ‖g₀‖ over the gradients of all tensors together; NaN when a tensor is missing on either side."""
    if found.gradients.keys() != reference.gradients.keys():
        return math.nan
    apart = sum(float((found.gradients[name] - own).square().sum()) for name, own in reference.gradients.items())
    whole = sum(float(own.square().sum()) for own in reference.gradients.values())
    return math.sqrt(apart / whole)


def check_arithmetic(tuned: Tuned, rows: Sequence[Example]) -> list[Check]:
    """Weights, gradients, a planted error, and training against evaluation; `rows` have one length.

    The adapter is changed; gradients and mode are afterwards as a fresh adapter has them.
    """
    backbone = tuned.backbone
    dtype = backbone.placement.compute_dtype
    label = label_of(tuned)
    nudge(tuned)
    other = twin(tuned)
    exact = _passes(other, rows, torch.float64)
    rounded = _passes(nn.Module.to(other, dtype), rows, dtype)
    del other
    allowed, shown_apart = TIMES * distance(rounded, exact), TIMES * relative(rounded.logits, exact.logits)
    found = _passes(tuned.model, rows, dtype, tuned)
    with planted(tuned):
        wrong = _passes(tuned.model, rows, dtype, tuned)
    apart = _evaluated(tuned, rows, dtype, found.logits)
    here = "four times the error of the same products in this dtype on the CPU, against float64"
    wrong_numbers = "do not train in this precision on this card; attach the file to an issue of peftkit"
    return [
        *_weights(tuned, label),
        held("gradients", label, distance(found, exact), _UNIT, high=allowed, source=here, hint=wrong_numbers),
        held(
            PLANTED,
            label,
            distance(wrong, exact),
            _UNIT,
            low=allowed,
            source="the last layer's backward pass was lost on purpose, and the check of gradients must see it",
            hint="the check of gradients says nothing here; attach the file to an issue of peftkit",
        ),
        held(
            "evaluation against training",
            label,
            apart,
            _UNIT,
            high=shown_apart,
            source=f"logits, each row alone; {here}",
            hint="figures of evaluation do not hold on this card; attach the file to an issue of peftkit",
        ),
    ]


@contextmanager
def planted(tuned: Tuned) -> Any:
    """Lose the backward pass through the last adapted layer's weight, as bitsandbytes' re-packed layers do."""
    last = list(adapted(tuned).values())[-1].base_layer
    hook = last.register_forward_hook(lambda module, inputs, output: output.detach())
    try:
        yield
    finally:
        hook.remove()


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """‖x − x₀‖ / ‖x₀‖."""
    return float((found - reference).norm() / reference.norm())


def _weights(tuned: Tuned, label: str) -> list[Check]:
    """What the device unpacks, against the format: every number within one rounding to the dtype it comes in."""
    if tuned.backbone.quant.bits != 4:
        return []
    worst, eps = 0.0, 0.0
    for layer in quantized_linears(tuned.model).values():
        dense, own = dense_weight(layer), unpacked(layer)
        eps = float(torch.finfo(dense.dtype).eps)
        worst = max(worst, float((dense.cpu().double() - own).abs().max() / own.abs().max()))
    source = "one rounding of the largest weight, in the dtype that the kernel unpacks to"
    hint = "the kernel reads the packed weights wrongly: train in 8 or 16 bits, and attach the file to an issue"
    # Double quantization adds two products in float32 before that rounding.
    return [held("unpacked weights", label, worst, _UNIT, high=max(eps, 2**-21), source=source, hint=hint)]


def _passes(model: Any, rows: Sequence[Example], dtype: torch.dtype, tuned: Tuned | None = None) -> Passes:
    """Forward and backward of the twin on the CPU the plain way, or of the tuned model where it is as training does."""
    device = tuned.backbone.device if tuned else CPU
    model.train(tuned is not None)
    paths = find_paths(tuned) if tuned else Paths()
    step = Step(model, rows, pad_id=0, device=device, forward=lambda: _context(device, dtype), paths=paths)
    step.run(sum(lengths(rows)))
    gradients = {}
    for name, layer in adapted(tuned).items() if tuned else _products(model):
        for factor in ("lora_A", "lora_B"):
            parameter = getattr(layer, factor)
            parameter = parameter[layer.active_adapters[0]].weight if tuned else parameter
            if parameter.grad is not None:
                gradients[f"{name}.{factor}"] = parameter.grad.detach().cpu().double()
    model.zero_grad(set_to_none=True)
    batch = pad(rows, 0, device)
    with _context(device, dtype):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return Passes(gradients, logits.detach().cpu().double())


def _products(model: Any) -> list[tuple[str, Product]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Product)]


def _evaluated(tuned: Tuned, rows: Sequence[Example], dtype: torch.dtype, trained: torch.Tensor) -> float:
    """How far the logits of each row alone, without gradients, are from those in training among its neighbours."""
    device = tuned.backbone.device
    tuned.model.eval()
    alone = []
    with torch.inference_mode(), _context(device, dtype):
        for row in rows:
            ids = torch.tensor([row.input_ids], device=device)
            alone.append(tuned.model(input_ids=ids, use_cache=False).logits.cpu().double())
    return relative(torch.cat(alone), trained)


def _context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return autocast(device, torch.float32 if dtype == torch.float64 else dtype)
