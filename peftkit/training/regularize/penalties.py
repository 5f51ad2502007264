"""L1, L2 and L2-SP: penalties on the trained tensors, whose gradients are known without a backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from peftkit.backbone.shard import part_like


@dataclass(frozen=True)
class Penalties:
    """λ₁ · Σ|w| + ½ · λ₂ · Σw² + ½ · α · ‖w - w⁰‖² over named tensors (Li et al. 2018, arXiv 1802.01483, eq. 3)."""

    l1: float = 0.0
    l2: float = 0.0
    l2_sp: float = 0.0
    start: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """w⁰ by name, whole."""
    spared: frozenset[str] = frozenset()
    """Names that λ₁ and λ₂ are not for: vectors and scales, whose neutral value need not be 0."""

    def add_gradients(self, tensors: Mapping[str, torch.nn.Parameter]) -> None:
        """Add λ₁ · sign(w) + λ₂ · w + α · (w - w⁰) to the gradients of those tensors that are trained now.

        One that is frozen for a while keeps no gradient. |w| has the slope 0 at 0, where lora_B starts.
        """
        with torch.no_grad():
            for name, tensor in tensors.items():
                if not tensor.requires_grad:
                    continue
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
                if self.l1 and name not in self.spared:
                    tensor.grad.add_(tensor.sign(), alpha=self.l1)
                if self.l2 and name not in self.spared:
                    tensor.grad.add_(tensor, alpha=self.l2)
                if self.l2_sp:
                    tensor.grad.add_(tensor - part_like(self.start[name], tensor), alpha=self.l2_sp)
