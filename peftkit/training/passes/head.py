"""The loss of labelled tokens without the logits of all: the head sees labelled positions alone, a chunk at a time.

`states_at_labels` takes what the model would give its head; `summed_loss` scores it in chunks of which no more than
one has logits at any time. With a vocabulary of 150,000, the logits of 2,048 tokens and what a loss makes of them are
4.9 GB in float32. The logits of a chunk are 64 MiB; a soft cap takes as much again, and 16-bit logits a float32 copy
besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from peftkit.data.chat import IGNORED

LOGITS_BYTES = 1 << 26
"""The most that one chunk of logits may take in float32."""


@dataclass(frozen=True)
class Head:
    """A model's head, and what the model does to its logits: logit = scale · head(x), then cap · tanh(logit / cap)."""

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    @property
    def rows(self) -> int:
        """C: at most so many rows of logits exist at once."""
        return max(1, LOGITS_BYTES // (4 * self.vocabulary))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits as the model would give them, of shape (…, vocabulary)."""
        logits = self.module(states)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def closed_form(self) -> bool:
        """Whether the gradient is worked out by hand: a plain linear layer that nothing watches."""
        head = self.module
        watched = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
        return type(head) is nn.Linear and not watched


@contextmanager
def _instead_of(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep what the head is given in the pass inside, and give it no position to work on."""
    given: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield given
    finally:
        handle.remove()


def states_before(head: nn.Module, model: Any, **inputs: Any) -> torch.Tensor:
    """What `model` gives its head for these inputs: (rows, positions, width). Raises ValueError unless it does once."""
    with _instead_of(head) as given:
        model(**inputs, use_cache=False)
    if len(given) != 1:
        raise ValueError(f"{type(model).__name__} called its head {len(given)} times in one pass")
    return given[0]


@contextmanager
def amplified(head: nn.Module, factor: float) -> Iterator[None]:
    """Multiply what the head is given in the passes inside."""
    handle = head.register_forward_pre_hook(lambda module, args: (args[0] * factor, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def states_at_labels(
    head: Head, model: Any, inputs: dict[str, Any], labels: torch.Tensor, *, keeps_some: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's input at every position that a label follows, (labels, width), and these labels (int64).

    `keeps_some`: the model takes `logits_to_keep`, so that what follows its blocks is computed for these columns alone.
    """
    targets = labels[:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    targets = targets[:, columns]
    if keeps_some:
        states = states_before(head.module, model, **inputs, logits_to_keep=columns)
    else:
        states = states_before(head.module, model, **inputs)[:, columns]
    wanted = (targets != IGNORED).flatten().nonzero().squeeze(1)
    states = states.flatten(0, 1)
    if wanted.numel() < states.shape[0]:
        states = states.index_select(0, wanted)
    return states, targets.flatten()[wanted]


def summed_loss(
    head: Head, states: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ (1 - ε) · CE + ε · mean(-log p), and Σ CE, in nats, of (labels, width) states; both 0-dim, the second detached.

    Gradients reach the states and, where they require one, the head's own parameters.
    """
    if head.closed_form:
        weight, bias = head.module.weight, head.module.bias
        loss, nll = _ClosedForm.apply(states, targets, weight, bias, head, label_smoothing)
        return loss, nll
    total = nll = torch.zeros((), device=states.device)
    for some, wanted in zip(states.split(head.rows), targets.split(head.rows), strict=True):
        loss, part = checkpoint(_chunk_loss, head, some, wanted, label_smoothing, use_reentrant=False)
        total, nll = total + loss, nll + part.detach()
    return total, nll


def _chunk_loss(
    head: Head, states: torch.Tensor, targets: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(_precise(head.logits(states)), dim=-1)
    nll = -log_p.gather(1, targets[:, None]).sum()
    return (nll if not epsilon else (1 - epsilon) * nll - epsilon * log_p.mean(dim=-1).sum()), nll


class _ClosedForm(torch.autograd.Function):  # type: ignore[misc]
    """Loss and gradient of a linear head in one pass over the chunks, as Liger and TRL's fused heads do on GPUs.

    The gradient of Σ (1 - ε) · CE + ε · mean(-log p) with respect to the logits is softmax - (1 - ε) · onehot - ε / V;
    it takes the logits' own memory, and nothing of a chunk's is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: Head,
        epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_states, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        by_states = torch.empty_like(states) if need_states else None
        dtype = _product_dtype(states, weight)
        low, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)  # a sum over chunks in 16 bits would round at each
        by_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        by_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and need_bias else None
        sums = torch.zeros(2, dtype=torch.float64, device=states.device)
        for start in range(0, states.shape[0], head.rows):
            some, wanted = states[start : start + head.rows], targets[start : start + head.rows]
            raw = linear(some.to(dtype), low, low_bias)
            slope, found = _scored(_precise(raw), wanted, head, epsilon)
            sums += found
            slope = slope.to(dtype)
            if by_states is not None:
                by_states[start : start + head.rows] = slope @ low
            if by_weight is not None:
                by_weight += slope.t() @ some.to(dtype)
            if by_bias is not None:
                by_bias += slope.sum(dim=0)
            del raw, slope  # or the next chunk's logits would be made beside them
        ctx.save_for_backward(by_states, by_weight, by_bias)
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        loss, nll = sums.to(torch.float64 if states.dtype == torch.float64 else torch.float32)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, loss: torch.Tensor, nll: Any) -> tuple[torch.Tensor | None, ...]:
        # Not in 16 bits: 1 / tokens rounded there would scale the gradients of the whole step.
        by_states, by_weight, by_bias = (
            None if found is None else (found.to(torch.promote_types(found.dtype, loss.dtype)) * loss).to(dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return by_states, None, by_weight, by_bias, None, None


def _scored(
    logits: torch.Tensor, targets: torch.Tensor, head: Head, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slope of the loss by the head's raw output, written over it, and the sums of loss and NLL."""
    if head.scale != 1.0:
        logits *= head.scale
    bend = None
    if head.cap is not None:
        logits.div_(head.cap).tanh_()
        bend = logits.square().neg_().add_(1)
        logits *= head.cap
    at = targets[:, None]
    vocabulary = logits.shape[1]
    logits -= logits.amax(dim=1, keepdim=True)
    chosen, mean = logits.gather(1, at), logits.mean(dim=1) if epsilon else None
    logits.exp_()
    norm = logits.sum(dim=1, keepdim=True)
    nll = (norm.log() - chosen).squeeze(1)
    loss = nll if mean is None else (1 - epsilon) * nll + epsilon * (norm.log().squeeze(1) - mean)
    logits /= norm
    logits.scatter_add_(1, at, torch.full_like(chosen, epsilon - 1))
    if epsilon:
        logits -= epsilon / vocabulary
    if bend is not None:
        logits *= bend
    if head.scale != 1.0:
        logits *= head.scale
    return logits, torch.stack([loss.sum(), nll.sum()]).double()


def _product_dtype(states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast's, where it is on, or the weight's."""
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        dtype: torch.dtype = torch.get_autocast_dtype(device)
        return dtype
    return weight.dtype


def _precise(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
