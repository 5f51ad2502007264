"""LoRA's products and their sum in one step of autograd, with nothing copied and nothing kept twice.

PEFT 0.21 computes base(x) + lora_B(lora_A(dropout(x))) · scaling: five steps of autograd, tensors of the result's and
of the input's size that live for a moment, and beneath autocast a float32 copy of x. docs/decisions/0017 has what one
step saves, and why q, k, v or gate, up are not computed as a group.

For the time of training passes a plain linear layer's base stands behind a module that computes both in one step
(`_Whole`); a quantized base computes its own product, to which `_Added` adds. PEFT's own place for other forms of LoRA
(`lora_variant`) says that there is nothing left to add. Layers with dropout, DoRA, a LoRA bias and the like stay.
"""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora import bnb as quantized
from torch import nn
from torch.nn.functional import linear

_QUANTIZED = [getattr(quantized, name, None) for name in ("Linear4bit", "Linear8bitLt")]  # absent without bitsandbytes
_LAYERS = tuple(kind for kind in (Linear, *_QUANTIZED) if kind is not None)


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Compute the active adapter's plain LoRA layers in one step each; the value is how many layers that is.

    The backward pass belongs inside too: gradient checkpointing computes the layers again there.
    """
    changed: list[tuple[Any, str, bool, nn.Module]] = []
    try:
        for layer in list(model.modules()):
            if (adapter := _plain(layer)) is not None:
                changed.append((layer, adapter, layer.cast_input_dtype_enabled, layer.base_layer))
                whole = _is_float(layer)
                layer.lora_variant[adapter] = _Nothing if whole else _Fused
                layer.cast_input_dtype_enabled = False
                if whole:
                    layer.base_layer = _Whole(layer, adapter)
        yield len(changed)
    finally:
        for layer, adapter, casts, base in changed:
            layer.lora_variant.pop(adapter, None)
            layer.cast_input_dtype_enabled = casts
            layer.base_layer = base


def _plain(layer: Any) -> str | None:
    """The adapter of a layer whose arithmetic is result + B(A(x)) · scaling and nothing else."""
    if type(layer) not in _LAYERS or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter: str = layer.active_adapters[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return None
    plain = isinstance(layer.lora_dropout[adapter], nn.Identity) and all(
        type(part) is nn.Linear and part.bias is None for part in (layer.lora_A[adapter], layer.lora_B[adapter])
    )
    return adapter if plain else None


def _is_float(layer: Any) -> bool:
    """Whether the base is a plain, frozen linear layer whose dtype its products are in."""
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
    )


class _Nothing:
    """In the place of one of PEFT's variants: the base's product has it all."""

    @staticmethod
    def forward(layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **options: Any) -> torch.Tensor:
        return result


class _Whole(nn.Module):  # type: ignore[misc]
    """In the place of a plain linear base: its product and LoRA's; the parameters are the base's, by their names."""

    def __init__(self, layer: Any, adapter: str) -> None:
        super().__init__()
        base = layer.base_layer
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.__dict__["_factors"] = layer.lora_A[adapter], layer.lora_B[adapter]  # no children: they have names already
        self.scaling = layer.scaling[adapter]
        self.training = base.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (…, in) to (…, out)."""
        a, b = (factor.weight for factor in self._factors)
        result: torch.Tensor
        if x.dtype == self.weight.dtype == _product_dtype(x, a):
            result = _Linear.apply(x, self.weight, self.bias, a, b, self.scaling)
        else:
            result = _Added.apply(linear(x, self.weight, self.bias), x, a, b, self.scaling)
        return result


class _Fused:
    """In the place of one of PEFT's variants: it is asked for the forward pass alone."""

    @staticmethod
    def forward(layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **options: Any) -> torch.Tensor:
        a, b = layer.lora_A[active_adapter].weight, layer.lora_B[active_adapter].weight
        added: torch.Tensor = _Added.apply(result, x, a, b, layer.scaling[active_adapter])
        return added


class _Linear(torch.autograd.Function):  # type: ignore[misc]
    """x Wᵀ + bias + s · x Aᵀ Bᵀ with frozen W (out, in) and bias.

    Saved: x, x Aᵀ and the factors. With g the gradient of the sum: ∂x = g W + s · g B A, ∂A = s · (g B)ᵀ x,
    ∂B = s · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.to(flat.dtype).t()
        result = linear(flat, weight, bias).addmm_(inner, b.to(flat.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, inner, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return _shaped(result, *x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, inner, weight, a, b = ctx.saved_tensors
        slope = gradient.reshape(-1, gradient.shape[-1])
        by_inner, by_a, by_b = _by_factors(slope, flat, inner, a, b, ctx.scaling)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (slope @ weight).addmm_(by_inner, a.to(slope.dtype)).view(ctx.shape)
        return by_x, None, None, by_a, by_b, None


class _Added(torch.autograd.Function):  # type: ignore[misc]
    """result + s · x Aᵀ Bᵀ, over `result` where it has memory of its own.

    x is (…, in), result (…, out), A (r, in), B (out, r). Saved: x, x Aᵀ, A, B. With g the gradient of the sum:
    ∂x = s · g B A, ∂A = s · (g B)ᵀ x, ∂B = s · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        dtype = _product_dtype(x, a)
        flat, low_a, low_b = x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype), b.to(dtype)
        inner = flat @ low_a.t()
        ctx.save_for_backward(flat, inner, a, b)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        if result.dtype != dtype:
            return result + (scaling * (inner @ low_b.t())).view(result.shape).to(result.dtype)
        if result._is_view() or not result.is_contiguous():
            flat_result = result.reshape(-1, result.shape[-1])
            return _shaped(torch.addmm(flat_result, inner, low_b.t(), alpha=scaling), *result.shape)
        ctx.mark_dirty(result)
        result.view(-1, result.shape[-1]).addmm_(inner, low_b.t(), alpha=scaling)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, inner, a, b = ctx.saved_tensors
        slope = gradient.reshape(-1, gradient.shape[-1]).to(flat.dtype)
        by_inner, by_a, by_b = _by_factors(slope, flat, inner, a, b, ctx.scaling)
        by_x = (by_inner @ a.to(flat.dtype)).view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return gradient if ctx.needs_input_grad[0] else None, by_x, by_a, by_b, None


def _by_factors(
    slope: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s · g B, and the gradients of A and B in their own dtypes; g (tokens, out), x (tokens, in), x Aᵀ (tokens, r)."""
    by_inner = (slope @ b.to(slope.dtype)).mul_(scaling)
    return by_inner, (by_inner.t() @ x).to(a.dtype), (slope.t() @ inner).mul_(scaling).to(b.dtype)


def _shaped(product: torch.Tensor, *shape: int) -> torch.Tensor:
    """A product in another shape, and no view to autograd: Gemma 3n goes on in place with a layer's result."""
    shaped: torch.Tensor = torch.ops.aten._unsafe_view(product, shape)
    return shaped


def _product_dtype(x: torch.Tensor, a: torch.Tensor) -> torch.dtype:
    """Autocast's, as PEFT's products would have; without it that of the factors, to which PEFT casts x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype: torch.dtype = torch.get_autocast_dtype(device)
        return dtype
    return a.dtype
