"""AdaLoRA in a run: ranks that fall while it trains, and factors that are kept orthogonal.

Zhang et al. 2023 (arXiv 2303.10512). PEFT's RankAllocator does the scoring and the masking; what it has to be told is
how long the run is, and when. For a share of the run the ranks stay as they are, then the budget of all ranks falls
as b(t) = b_T + (b_0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³ from init_r to r per module, and at the end it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from peftkit.errors import TuningError
from peftkit.tuning.initial import NAME
from peftkit.tuning.tuned import Tuned

_BEFORE, _AFTER = 0.1, 0.3
"""Shares of the run before the first rank is taken and after the last one; chosen, not swept."""
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Allocator:
    """What AdaLoRA does beside the optimizer; an adapter that was pruned before keeps its ranks."""

    def __init__(self, tuned: Tuned, steps: int) -> None:
        if steps < 2:
            raise TuningError(
                f"adapter.method=adalora lowers the ranks while it trains, and the run has {steps} step",
                expected="at least 2 steps",
                hint="raise train.max_steps, or adapter.method=lora",
            )
        self.config = tuned.model.peft_config[NAME]
        self.layers = tuned.model.base_model
        self.prunes = self.config.rank_pattern is None
        kept = None if self.prunes else _ranks_now(tuned)
        self.masks = kept is not None
        """Whether ranks that were taken have a place in the tensors still: a gradient would bring them back."""
        if kept is not None:
            self.config.rank_pattern = kept
        self.config.total_step = steps
        self.config.tinit, self.config.tfinal = int(_BEFORE * steps), int(_AFTER * steps)
        held = [(name, p) for name, p in tuned.trainable.items() if p.numel()]
        self.right = [p for name, p in held if ".lora_A." in name]
        self.left = [p for name, p in held if ".lora_B." in name]

    def penalize(self) -> None:
        """Add the gradient of orth_reg_weight · mean ‖PᵀP − I‖, ‖QQᵀ − I‖ (Frobenius; PEFT's AdaLoraModel.forward)."""
        weight, factors = self.config.orth_reg_weight, [*self.right, *self.left]
        if not weight or not factors:
            return
        with torch.enable_grad():
            grams = [q @ q.T for q in self.right] + [p.T @ p for p in self.left]
            norms = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
            gradients = torch.autograd.grad(weight * torch.stack(norms).mean(), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def allocate(self, step: int) -> None:
        """Score and mask after the optimizer's step `step`, counted from 1, while its gradients are still there."""
        if self.prunes:
            self.layers.update_and_allocate(step)
        elif self.masks:
            self.layers.rankallocator.mask_using_rank_pattern(self.layers.model, self.config.rank_pattern)

    def state(self) -> dict[str, Any]:
        """The moving averages of the scores, and which ranks are left."""
        ranks = self.layers.rankallocator
        kept = {"prunes": self.prunes, "rank_pattern": self.config.rank_pattern}
        return kept | {name: dict(getattr(ranks, name)) for name in _AVERAGES}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.prunes = state["prunes"]
        if not self.prunes:
            return
        self.config.rank_pattern = state["rank_pattern"]
        devices = {name: parameter.device for name, parameter in self.layers.model.named_parameters()}
        for name in _AVERAGES:
            held = {key: value.to(devices[key]) for key, value in state[name].items()}
            setattr(self.layers.rankallocator, name, held)


def allocator(tuned: Tuned, steps: int) -> Allocator | None:
    """The allocator of a run of so many steps; None for other methods. Raises TuningError for a run of one step."""
    return Allocator(tuned, steps) if tuned.spec.method == "adalora" else None


@contextmanager
def ranks_as_they_are(tuned: Tuned) -> Iterator[None]:
    """Let `rank_pattern` name the ranks whose value is not 0 now; a checkpoint holds only those.

    PEFT's is that of the last masking, which the best adapter of a run may have come before.
    """
    config = tuned.model.peft_config[NAME]
    before = config.rank_pattern
    kept = None if before is None else _ranks_now(tuned)
    if kept is not None:
        config.rank_pattern = kept
    try:
        yield
    finally:
        config.rank_pattern = before


def _ranks_now(tuned: Tuned) -> dict[str, list[bool]] | None:
    """Which ranks of each layer have a value that is not 0; None where those that were taken have no place any more."""
    values = {name: p for name, p in tuned.model.base_model.model.named_parameters() if f".lora_E.{NAME}" in name}
    if any(len(value) != tuned.model.peft_config[NAME].init_r for value in values.values()):
        return None
    return {name: (value != 0).flatten().tolist() for name, value in values.items()}
