"""Settings of training that a kind of rows does not go with, whatever the base: plans refuse them too."""

from __future__ import annotations

from peftkit.config import Spec
from peftkit.data.preference.spec import Kind, PreferenceSpec
from peftkit.data.tasks.spec import TaskSpec
from peftkit.errors import ConfigError, TrainingError
from peftkit.training.preference.spec import PreferenceLoss, PreferenceTrainSpec
from peftkit.training.spec import TrainSpec


def check_rows(data: Spec, spec: TrainSpec) -> None:
    """Raise TrainingError or ConfigError for a setting that these rows cannot be trained with."""
    if isinstance(data, PreferenceSpec) and isinstance(spec, PreferenceTrainSpec):
        check_loss(spec.loss, data.kind)
    if isinstance(data, TaskSpec) and data.task not in ("translation", "summarization"):
        check_under_head(spec)


def check_loss(loss: PreferenceLoss, kind: Kind) -> None:
    """Raise ConfigError for a loss of preferences that learns from the other kind of rows."""
    wanted: Kind = "labelled" if loss == "kto" else "pairs"
    if kind != wanted:
        raise ConfigError(
            [f"train.loss={loss} learns from {wanted} rows, and these are {kind}"], hint=f"data.kind={wanted}"
        )


def check_under_head(spec: TrainSpec) -> None:
    """Raise TrainingError for what needs answers, where a task's head gives none."""
    if spec.trunk_cache:
        raise TrainingError(
            "train.trunk_cache keeps the hidden states of answers, and this run trains a task's head",
            expected="train.trunk_cache=false",
            hint="remove train.trunk_cache; a smaller data.max_length helps too",
        )
