"""Settings of training that what is trained does not go with, each with its reason."""

from __future__ import annotations

from peftkit.errors import TrainingError
from peftkit.training.method_rules import check_method, instead, pulling
from peftkit.training.spec import TrainSpec
from peftkit.tuning.depth import decaying
from peftkit.tuning.tuned import Tuned


def check_suited(tuned: Tuned, spec: TrainSpec) -> None:
    """Raise TrainingError for a setting that would be ignored, or would train something else than the method says."""
    check_method(tuned.spec, spec)
    if (pull := pulling(spec)) and not decaying(tuned.model, tuned.trainable):
        name, value = pull
        raise TrainingError(
            f"train.{name}={value:g} has no effect with adapter.method={tuned.spec.method}: it is for matrices, and "
            "this trains vectors and scales, whose neutral value need not be 0",
            expected="a penalty that pulls to the beginning",
            hint=instead(name, value),
        )
