"""Training on worst-case embeddings: perturbations that follow the gradient of the loss upwards.

FGM (Miyato et al. 2017, arXiv 1605.07725) is the ascent with a start at 0 and one step of the length ε: the mean of
the clean gradient and of the one at e + ε · g / ‖g‖. FreeLB (Zhu et al. 2020, arXiv 1909.11764) starts anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from peftkit.training.regularize.embeddings import Change


def ascent(
    passed: Callable[[Change, float], float],
    start: torch.Tensor,
    tokens: torch.Tensor,
    again: Callable[[], None],
    *,
    epsilon: float,
    steps: int,
    step_size: float,
) -> float:
    """FreeLB (arXiv 1909.11764, algorithm 1): `steps` passes, each with 1/steps of the gradient and a worse δ.

    δ ← δ + step_size · g / ‖g‖, and back to ‖δ‖ ≤ ε, for every row. `passed` runs one pass with a change of the
    embeddings and a share of the gradient; `again` goes back to the same dropout draw, as the paper's section 3.3 asks.
    Returns what the first pass returned.
    """
    delta, first = start, math.nan
    for at in range(steps):
        again()
        delta = delta.detach().requires_grad_()
        value = passed(lambda embedded, delta=delta: embedded + delta.to(embedded.dtype), 1 / steps)  # type: ignore[misc]
        first = value if at == 0 else first
        if at + 1 < steps:
            assert delta.grad is not None  # the pass went backward
            delta = worse(delta.detach(), delta.grad * tokens, epsilon=epsilon, step_size=step_size)
    return first


def worse(delta: torch.Tensor, gradient: torch.Tensor, *, epsilon: float, step_size: float) -> torch.Tensor:
    """One projected ascent step; a row without a gradient (no answer token) stays as it is."""
    norms = row_norms(gradient)
    moved = delta + step_size * torch.where(norms > 0, gradient / norms, 0.0)
    shrink = (epsilon / row_norms(moved).clamp(min=torch.finfo(moved.dtype).tiny)).clamp(max=1.0)
    return moved * shrink


def uniform_start(tokens: torch.Tensor, width: int, epsilon: float) -> torch.Tensor:
    """U(-ε, ε) / √(L · d) on every token, float32 (rows, longest, width): its norm never passes ε (FreeLB, line 5)."""
    start = torch.empty(*tokens.shape[:2], width, device=tokens.device).uniform_(-1, 1)
    return start * (epsilon / torch.sqrt(tokens.sum(dim=1, keepdim=True) * width) * tokens)


def row_norms(values: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of every row of (rows, longest, width), as (rows, 1, 1)."""
    norms: torch.Tensor = values.flatten(1).norm(dim=1)
    return norms[:, None, None]
