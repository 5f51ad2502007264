"""bitsandbytes, held to one behaviour: evaluating never changes weights and computes what training computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkit.backbone.bnb import Linear4bit, Linear8bitLt, MatMul8bitFp


class TrainingPathLinear8bit(Linear8bitLt):  # type: ignore[misc]
    """An int8 layer that computes in evaluation what it computes in training.

    In eval mode bitsandbytes quantizes the activations too, with outlier columns taken batch-wide: logits move by
    5.5 % and a row's logits depend on its neighbours by 2.9 % (SmolLM2-135M). The training path does neither.
    """

    def train(self, mode: bool = True) -> TrainingPathLinear8bit:
        """Stay in training mode whatever is asked; an int8 layer has no dropout or statistics to switch."""
        super().train(True)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (…, in) in a float dtype times the dequantized weight, on every device.

        Upstream does this in training on a CPU only; elsewhere activations are quantized, rows depending on their
        neighbours.
        """
        if self.weight.CB is not None:
            self.init_8bit_state()
        result: torch.Tensor = MatMul8bitFp.apply(x, self.weight, None, self.bias, self.state)
        return result

    def init_8bit_state(self) -> None:
        """Take codes and scales over from the weight; keep those in the state where the weight has lost its scales.

        PEFT copies a layer's weight without them (DoRA does), and upstream would overwrite the scales with None.
        """
        if self.weight.SCB is None:
            self.weight.CB = None
        else:
            super().init_8bit_state()


def contain_bitsandbytes(model: nn.Module) -> dict[str, int]:
    """Switch off what bitsandbytes does by itself in eval mode; return how many layers of each kind were held.

    On CPUs with AVX512-BF16, `Linear4bit` re-packs its weights in place at the first eval or no-grad forward, and
    training after that silently runs without gradients through the layer (`nn/modules.py`, 0.50.2).
    """
    held = {"4-bit": 0, "8-bit": 0}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            held["4-bit"] += 1
        elif isinstance(module, Linear8bitLt):
            # Re-classing this instance leaves upstream's class alone and keeps the loaded int8 state.
            module.__class__ = TrainingPathLinear8bit
            if module.weight.CB is not None:
                # Normally done by the first forward; DoRA dequantizes before that and finds no scales.
                module.init_8bit_state()
            module.train()
            held["8-bit"] += 1
    return held


def is_repacked(model: nn.Module) -> bool:
    """Whether any 4-bit weight lies in the CPU inference layout, in which training is silently wrong."""
    states = (
        getattr(module.weight, "quant_state", None) for module in model.modules() if isinstance(module, Linear4bit)
    )
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """Every bitsandbytes linear layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that makes up the frozen base, with quantization state: what must never change.

    Keys are module paths; adapters' own parameters (anything that requires grad, or whose name has `lora_`) are left
    out. Tensors are the live ones, in their storage dtype.
    """
    found = {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not tensor.requires_grad and "lora_" not in name
    }
    for name, module in quantized_linears(model).items():
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=False).items():
                if isinstance(value, torch.Tensor):
                    found[f"{name}.quant_state.{key}"] = value.detach()
        for key in ("CB", "SCB"):
            value = getattr(getattr(module, "state", None), key, None)
            if isinstance(value, torch.Tensor):
                found[f"{name}.state.{key}"] = value.detach()
    return found
