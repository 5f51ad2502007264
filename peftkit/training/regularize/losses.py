"""The loss of answer tokens, and what label smoothing and R-Drop make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftkit.data.chat import IGNORED
from peftkit.generation.forward import label_logits, token_nll
from peftkit.training.passes.head import states_at_labels, summed_loss

if TYPE_CHECKING:
    from peftkit.training.passes.paths import Paths


@dataclass(frozen=True)
class TokenLoss:
    """What is minimized, summed over answer tokens."""

    label_smoothing: float = 0.0
    r_drop: float = 0.0

    def __call__(
        self, model: Any, batch: dict[str, Any], paths: Paths | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the NLL, each a 0-dim sum over the answer tokens of `batch` in nats.

        With R-Drop, `batch` is one of `twice`, and both are means of its two halves.
        """
        if paths is not None and paths.head is not None and not self.r_drop:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            states, targets = states_at_labels(paths.head, model, inputs, batch["labels"], keeps_some=paths.keeps_some)
            return summed_loss(paths.head, states, targets, self.label_smoothing)
        if not self.label_smoothing and not self.r_drop:
            nll = token_nll(model, batch).sum()
            return nll, nll
        logits, wanted = label_logits(model, batch)
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        targets = batch["labels"][:, 1:][:, wanted]
        loss, nll = smoothed(log_p, targets, self.label_smoothing)
        if not self.r_drop:
            return loss, nll
        first, second = log_p.chunk(2)
        answers = targets.chunk(2)[0] != IGNORED
        apart = (symmetric_kl(first, second) * answers).sum()
        return loss / 2 + self.r_drop * apart, nll.detach() / 2


def smoothed(
    log_p: torch.Tensor, targets: torch.Tensor, epsilon: float, among: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ (1 - ε) · CE + ε · mean(-log p), and Σ CE, over the targets that are not IGNORED.

    `log_p` has the shape (rows, n, vocabulary), `targets` (rows, n); `among`, a mask that broadcasts to `log_p`, says
    which classes a row has, and log p of the others is 0. Szegedy et al. 2016, section 7.
    """
    answers = targets != IGNORED
    nll = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * answers
    mean = log_p.mean(dim=-1) if among is None else log_p.sum(dim=-1) / among.sum(dim=-1)
    return ((1 - epsilon) * nll - epsilon * mean * answers).sum(), nll.detach().sum()


def symmetric_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """½ · [KL(p₁‖p₂) + KL(p₂‖p₁)] of log-probabilities over the last axis, which is ½ · Σ (p₁ - p₂) · log(p₁ / p₂).

    Both directions have a gradient in both. R-Drop (arXiv 2106.14448) adds the losses of the two passes where peftkit
    takes their mean: half of the paper's α means the same here.
    """
    return ((first.exp() - second.exp()) * (first - second)).sum(dim=-1) / 2


def twice(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every row twice: the first halves of what comes out are one dropout draw, the second halves another."""
    return {name: torch.cat([value, value]) for name, value in batch.items()}
