"""Settings of training that a method does not go with, whatever the base: plans refuse them too, without torch."""

from __future__ import annotations

from peftkit.errors import TrainingError
from peftkit.training.spec import TrainSpec
from peftkit.tuning.methods import AdapterSpec


def check_method(adapter: AdapterSpec, spec: TrainSpec) -> None:
    """Raise TrainingError for a setting that would be ignored, or would train something else than the method says."""
    method = adapter.method
    if method == "pissa" and (pull := pulling(spec)):
        name, value = pull
        raise TrainingError(  # its ΔW is s (BA − B0 A0)
            f"train.{name}={value:g} with adapter.method=pissa pulls away from the base: its factors begin as "
            "the base's main directions, and 0 is the base without them",
            expected="a penalty that pulls to the beginning",
            hint=instead(name, value),
        )
    if method == "prefix_tuning" and spec.gradient_checkpointing:
        raise TrainingError(
            "train.gradient_checkpointing with adapter.method=prefix_tuning: its prefixes lie in the cache, and layers "
            "that are computed again read none",
            expected="train.gradient_checkpointing=false",
            hint="train.gradient_checkpointing=false, or adapter.method=prompt_tuning",
        )
    if method == "adalora" and (spec.unfreeze.direction != "none" or spec.freezeout.t_0 is not None):
        setting = "unfreeze.direction" if spec.unfreeze.direction != "none" else "freezeout.t_0"
        raise TrainingError(
            f"train.{setting} with adapter.method=adalora: it compares ranks by gradients, and frozen layers have none",
            expected="all layers trained from the first step to the last",
            hint=f"{spec.unfreeze.off or 'train.freezeout.t_0=null'}, or adapter.method=lora",
        )


def pulling(spec: TrainSpec) -> tuple[str, float] | None:
    """The first setting that pulls numbers towards 0, and its value."""
    pulls = {
        "weight_decay": spec.weight_decay,
        "regularize.l1": spec.regularize.l1,
        "regularize.l2": spec.regularize.l2,
    }
    return next(((name, value) for name, value in pulls.items() if value), None)


def instead(name: str, value: float) -> str:
    """The settings that pull as much to the beginning."""
    return f"train.{name}=0 train.regularize.l2_sp={value:g}"
