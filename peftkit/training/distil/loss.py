"""The loss of distillation at labelled positions, a chunk of logits at a time.

With the logits z_s of the student and z_t of the teacher, a position with the answer token y costs
(1 - w) · CE(softmax(z_s), y) + w · T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)) nats (Hinton et al. 2015, section 2).
Its gradient is (1 - w) · (softmax(z_s) - onehot(y)) + w · T · (softmax(z_s / T) - softmax(z_t / T)); T² keeps the
second part about as large when T grows, where it nears w · (z_s - z_t) / V for centred logits of V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from peftkit.data.chat import IGNORED
from peftkit.generation.forward import label_logits
from peftkit.training.passes.head import Head, states_at_labels
from peftkit.training.passes.paths import Paths


@dataclass(frozen=True)
class Scored:
    """What a model says at the labelled positions of a batch."""

    states: torch.Tensor
    """What its head is given, (labels, width); where the head is not known, the logits."""
    targets: torch.Tensor
    """The labels, int64."""
    head: Head | None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Autocast, where the head's differs from the caller's."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of some of the states, in at least 32 bits."""
        with self.around():
            found = states if self.head is None else self.head.logits(states)
        return found if found.dtype == torch.float64 else found.float()


def scored(model: Any, batch: dict[str, Any], paths: Paths) -> Scored:
    """One pass of a model over a batch as `Paths.laid` makes it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if paths.head is not None:
        states, targets = states_at_labels(paths.head, model, inputs, batch["labels"], keeps_some=paths.keeps_some)
        return Scored(states, targets, paths.head)
    logits, columns = label_logits(model, batch)
    targets = batch["labels"][:, 1:][:, columns]
    labelled = targets != IGNORED
    return Scored(logits[labelled], targets[labelled], None)


def summed(student: Scored, teacher: Scored, temperature: float, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the NLL in nats, each a 0-dim sum over the labels; the second has no gradient.

    A chunk has the C rows of the student's `Head.rows`; the logits of both models for one chunk alone, and what becomes
    of them, exist at once. They are made again in the backward pass.
    """
    total = student.states[:0].float().sum()  # of no label too, a sum with a gradient
    nll = torch.zeros_like(total.detach())
    for some in _chunks(student, teacher):
        given = student, teacher, student.states[some], some, temperature, weight
        loss, part = checkpoint(_chunk, *given, use_reentrant=False)
        total, nll = total + loss, nll + part.detach()
    return total, nll


def divergence(student: Scored, teacher: Scored) -> float:
    """Σ KL(teacher ‖ student) over the labels, in nats, at temperature 1."""
    total = 0.0
    with torch.no_grad():
        for some in _chunks(student, teacher):
            pair = student.logits(student.states[some]), teacher.logits(teacher.states[some])
            total += float(tempered_kl(*pair, 1.0).double().sum())
    return total


def tempered_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(z_t / T) ‖ softmax(z_s / T)) over the last axis, in nats.

    Where one head has more rows than the other (padding of the vocabulary), the tokens of both count.
    """
    tokens = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = (torch.log_softmax(z[..., :tokens] / temperature, dim=-1) for z in (student, teacher))
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)


def _chunk(
    student: Scored, teacher: Scored, states: torch.Tensor, some: slice, temperature: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = student.logits(states)
    nll = cross_entropy(logits, student.targets[some], reduction="sum")
    with torch.no_grad():
        theirs = teacher.logits(teacher.states[some])
    apart = tempered_kl(logits, theirs, temperature).sum()
    return (1 - weight) * nll + weight * temperature**2 * apart, nll


def _chunks(student: Scored, teacher: Scored) -> list[slice]:
    labels = student.targets.shape[0]
    rows = min((each.head.rows for each in (student, teacher) if each.head is not None), default=max(1, labels))
    return [slice(start, start + rows) for start in range(0, labels, rows)]
