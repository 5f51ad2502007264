"""How the rows of a distillation are scored: the student's pass, and the teacher's over the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.errors import TrainingError
from peftkit.events import Report, silent
from peftkit.generation.forward import Labelled, autocast, bounded, by_length, pad
from peftkit.process_group import launched
from peftkit.training.distil.loss import divergence, scored, summed
from peftkit.training.distil.spec import DistilSpec
from peftkit.training.distil.teacher import Teacher
from peftkit.training.passes.paths import Loss, Paths
from peftkit.training.passes.trying import find_paths
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class DistilPaths(Paths):
    """Padded passes of a student, each beside one of its teacher; the loss that is shown stays the NLL."""

    teacher: Teacher
    distil: DistilSpec

    @property
    def names(self) -> list[str]:
        """The shortcuts in words, and the teacher."""
        spec = self.distil
        return [*super().names, f"teacher {self.teacher.name}, T = {spec.temperature:g}, w = {spec.weight:g}"]

    def loss(self, spec: RegularizeSpec) -> Loss:
        """The distillation's; without weight, that of training without a teacher.

        Raises TrainingError for regularizers whose meaning beside a teacher is not defined.
        """
        if not self.distil.weight:
            return super().loss(spec)
        refused = [name for name in ("label_smoothing", "r_drop") if getattr(spec, name)]
        if refused:
            raise TrainingError(
                f"train.regularize.{refused[0]} does not go with distillation, whose teacher smooths the labels itself",
                expected="distil.temperature and distil.weight to say how much",
                hint=f"remove train.regularize.{refused[0]}",
            )
        return self._distilled

    def _distilled(self, model: Any, batch: dict[str, Any], paths: Paths) -> tuple[torch.Tensor, torch.Tensor]:
        said = self.teacher.score(batch)
        return summed(scored(model, batch, paths), said, self.distil.temperature, self.distil.weight)

    def apart(self, tuned: Tuned, model: Any, rows: Sequence[Labelled], *, batch_size: int = 8) -> float:
        """KL(teacher ‖ student) in nats per answer token at temperature 1; `model` is the student or its base."""
        backbone, total = tuned.backbone, 0.0
        was_training = model.training
        model.eval()
        try:
            for indices in bounded(by_length(rows, batch_size), rows, model):
                batch = pad([rows[index] for index in indices], backbone.tokenizer.pad_id, backbone.device)
                with torch.no_grad(), autocast(backbone.device, backbone.placement.compute_dtype):
                    total += divergence(scored(model, batch, self), self.teacher.score(batch))
        finally:
            model.train(was_training)
        return total / self.counted(rows)


def distil_paths(
    tuned: Tuned, teacher: Teacher, spec: DistilSpec, train: TrainSpec, report: Report = silent
) -> DistilPaths:
    """The passes of a distillation, with the shortcuts that are right for the student.

    Raises TrainingError for settings under which the teacher would not see what the student sees.
    """
    if train.trunk_cache:
        raise TrainingError(
            "train.trunk_cache does not go with distillation: the teacher needs tokens, and a cached trunk has none",
            hint="train.trunk_cache=false",
        )
    if launched().sharded:
        raise TrainingError(
            "distillation does not go with FSDP, which spreads the tensors that the teacher computes with",
            expected="one process, or DDP",
            hint="accelerate launch --multi_gpu",
        )
    found = find_paths(tuned, rows_as_batch=True, report=report)
    return DistilPaths(**vars(found), teacher=teacher, distil=spec)
