"""How a task's rows go through the model: padded side by side, scored by the head, counted by rows or tagged tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkit.backbone.heads import outputs_of
from peftkit.base.head import Head
from peftkit.errors import TrainingError
from peftkit.events import Report, silent
from peftkit.generation.forward import by_length
from peftkit.generation.tasks import Pixels, check_ends, collate
from peftkit.training.passes.paths import Loss, Paths, told
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.row_rules import check_under_head
from peftkit.training.spec import TrainSpec
from peftkit.training.tasks.losses import TaskLoss, check_losses
from peftkit.tuning.fused import fused_lora
from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class TaskPaths(Paths):
    """Padded rows and a task's head."""

    task: Head
    pixels: Pixels | None = None
    """How images become numbers."""

    def counted(self, rows: Sequence[Any]) -> int:
        """Rows; of token classification the tagged words, of seq2seq the tokens of the targets."""
        return sum(row.answer_tokens for row in rows)

    def loss(self, spec: RegularizeSpec) -> Loss:
        """The head's loss with what regularizers of losses make of it."""
        return TaskLoss(self.task, spec.label_smoothing, spec.r_drop)

    @contextmanager
    def laid(
        self, model: Any, rows: Sequence[Any], *, flat: bool, pad_id: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """One micro-batch as the model is called with it, labels included."""
        yield collate(rows, self.task, pad_id, device, self.pixels)

    def measure(
        self, model: Any, rows: Sequence[Any], *, pad_id: int, device: torch.device, batch_size: int
    ) -> list[float]:
        """The summed loss of each row without gradients, in the order of `rows`."""
        loss, sums = TaskLoss(self.task), [0.0] * len(rows)
        with torch.inference_mode():
            for indices in self.measured_together(model, rows, batch_size):
                batch = collate([rows[i] for i in indices], self.task, pad_id, device, self.pixels)
                for index, value in zip(indices, loss.of_rows(model, batch).double().tolist(), strict=True):
                    sums[index] = value
        return sums

    def measured_together(self, model: Any, rows: Sequence[Any], batch_size: int) -> list[list[int]]:
        """Rows of similar length; a head's few scores bound nothing."""
        return by_length(rows, batch_size)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """All but the labels."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def compared(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The scores of rows, or of the tokens that are not padding."""
        scores = outputs_of(self.task, model(**self.inputs(batch)))
        return scores[batch["attention_mask"].bool()] if self.task.kind in ("token", "span") else scores

    def begin(self, model: Any) -> None:
        """Training mode; statistics that a batch would change stay as they are, and so does what is frozen of images.

        Batch norms hold the base's own running statistics, which the backbone shares. What is frozen of an image model
        is a trunk that gives the same features every time: its dropped paths would only add noise.
        """
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                module.eval()
        if self.task.kind == "image":
            for module in model.modules():
                trains = [parameter.requires_grad for parameter in module.parameters()]
                if trains and not any(trains):  # dropout has no parameters: it goes with what it stands in
                    module.eval()


def task_paths(
    tuned: Tuned, spec: TrainSpec, rows: Sequence[Any], pixels: Pixels | None = None, *, report: Report = silent
) -> TaskPaths:
    """The paths of a run. Raises TrainingError for settings of training that are for answers alone."""
    head = tuned.backbone.head
    assert head is not None  # a task's backbone is loaded with its head
    check_losses(head, spec.regularize.label_smoothing, spec.regularize.r_drop)
    check_under_head("seq2seq" if tuned.inner.config.is_encoder_decoder else head.kind, spec)
    if head.kind == "image" and spec.regularize.on_embeddings:
        name = spec.regularize.on_embeddings[0]
        raise TrainingError(
            f"train.regularize.{name} changes embeddings of tokens, and images have none",
            hint=f"remove train.regularize.{name}",
        )
    check_ends(rows, tuned.backbone)
    with fused_lora(tuned.model) as layers:
        fused = layers > 0
    reason = "a task's rows are padded side by side"
    return told(TaskPaths(task=head, pixels=pixels, fused=fused, reasons=(reason,)), report)
