"""Settings of training that a method of adapting does not go with, each with its reason."""

from __future__ import annotations

from peftkit.errors import TrainingError
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned


def check_suited(tuned: Tuned, spec: TrainSpec) -> None:
    """Raise TrainingError for a setting that would be ignored, or would train something else than the method says."""
    method = tuned.spec.method
    if method == "pissa":
        _refuse_decay(spec)
    if spec.gradient_checkpointing and getattr(tuned.model, "fills_the_cache", False):
        raise TrainingError(
            f"train.gradient_checkpointing with adapter.method={method}: its prefixes lie in the cache, and layers "
            "that are computed again read none",
            expected="train.gradient_checkpointing=false",
            hint="lower train.per_device_train_batch_size, or adapter.method=prompt_tuning",
        )
    if method == "adalora" and (spec.unfreeze.direction != "none" or spec.freezeout.t_0 is not None):
        setting = "unfreeze.direction" if spec.unfreeze.direction != "none" else "freezeout.t_0"
        raise TrainingError(
            f"train.{setting} with adapter.method=adalora: it compares ranks by gradients, and frozen layers have none",
            expected="all layers trained from the first step to the last",
            hint=f"remove train.{setting}, or adapter.method=lora",
        )


def _refuse_decay(spec: TrainSpec) -> None:
    """With ΔW = s (BA − B0 A0), factors of zero are not the base: they are the base without its main directions."""
    pulls = {
        "weight_decay": spec.weight_decay,
        "regularize.l1": spec.regularize.l1,
        "regularize.l2": spec.regularize.l2,
    }
    used = next((name for name, value in pulls.items() if value), None)
    if used is not None:
        raise TrainingError(
            f"train.{used}={pulls[used]:g} with adapter.method=pissa pulls away from the base: its factors begin as "
            "the base's main directions, and 0 is the base without them",
            expected="a penalty that pulls to the beginning",
            hint=f"train.{used}=0 train.regularize.l2_sp={pulls[used]:g}",
        )
