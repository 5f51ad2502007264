"""The loss of a task's head, summed over what it counts: rows, tagged tokens, or tokens of a target text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

from peftkit.backbone.heads import outputs_of
from peftkit.base.head import Head
from peftkit.data.chat import IGNORED
from peftkit.errors import TrainingError
from peftkit.training.regularize.losses import smoothed, symmetric_kl

Piece = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]
"""Log-probabilities (rows, n, classes), classes (rows, n) with IGNORED where none counts, a weight, and where rows have
not all classes a mask of theirs (rows, 1, classes): log-probabilities of the others are 0."""


@dataclass(frozen=True)
class TaskLoss:
    """What is minimized, and what is shown.

    Cross-entropy of a label, a tag, or a target token; the mean of those of a span's two ends; the mean binary
    cross-entropy of a row's labels; the squared error of a number.
    """

    head: Head
    label_smoothing: float = 0.0
    r_drop: float = 0.0

    def __call__(self, model: Any, batch: dict[str, Any], paths: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss with its regularizers, and without: 0-dim sums over what the head counts."""
        if self.head.problem != "single_label":
            total = self._unclassed(model, batch).sum()
            return total, total
        loss = nll = torch.zeros((), device=batch["labels"].device)
        for log_p, classes, weight, among in self._pieces(model, batch):
            part, shown = smoothed(log_p, classes, self.label_smoothing, among)
            loss, nll = loss + weight * part, nll + weight * shown
            if self.r_drop:
                first, second = log_p.chunk(2)
                counts = classes.chunk(2)[0] != IGNORED
                loss = loss + 2 * self.r_drop * weight * (symmetric_kl(first, second) * counts).sum()
        return (loss / 2, nll / 2) if self.r_drop else (loss, nll)

    def of_rows(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of each row without regularizers, float32 of shape (rows,)."""
        if self.head.problem != "single_label":
            return self._unclassed(model, batch)
        rows = torch.zeros(len(batch["labels"]), device=batch["labels"].device)
        for log_p, classes, weight, _ in self._pieces(model, batch):
            picked = log_p.gather(-1, classes.clamp(min=0)[..., None])[..., 0]
            rows = rows - weight * (picked * (classes != IGNORED)).sum(dim=1)
        return rows

    def _pieces(self, model: Any, batch: dict[str, Any]) -> Sequence[Piece]:
        scores, labels = _scores(self.head, model, batch), batch["labels"]
        if self.head.kind == "span":  # its classes are the positions that are not padding
            among = batch["attention_mask"].bool()[:, None]
            ends = scores.transpose(1, 2).masked_fill(~among, torch.finfo(scores.dtype).min)
            return [(log_softmax(ends, dim=-1).masked_fill(~among, 0.0), labels, 0.5, among)]
        log_p = log_softmax(scores, dim=-1)
        if self.head.kind in ("sequence", "image"):
            return [(log_p[:, None], labels[:, None], 1.0, None)]
        return [(log_p, labels, 1.0, None)]

    def _unclassed(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        scores, labels = _scores(self.head, model, batch), batch["labels"]
        if self.head.problem == "regression":
            return (scores[:, 0] - labels) ** 2
        return binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(dim=1)


def check_losses(head: Head, label_smoothing: float, r_drop: float) -> None:
    """Raise TrainingError for a regularizer of class probabilities where a head gives none."""
    if head.problem != "single_label" and (label_smoothing or r_drop):
        name = "label_smoothing" if label_smoothing else "r_drop"
        raise TrainingError(
            f"train.regularize.{name} is for one label among several, and this head gives {head.problem.split('_')[0]}",
            expected="a task with one label per row or token",
            hint=f"remove train.regularize.{name}",
        )


def _scores(head: Head, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if head.kind == "seq2seq":  # the model makes the decoder's input of the labels; its own loss is not used
        inputs["labels"] = batch["labels"]
    return outputs_of(head, model(**inputs))
