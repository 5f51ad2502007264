"""Settings of training that a kind of rows does not go with, whatever the base: plans refuse them too."""

from __future__ import annotations

from peftkit.base.head import HeadKind
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
    if isinstance(data, TaskSpec) and data.task == "image_classification":
        check_under_head("image", spec)


def check_loss(loss: PreferenceLoss, kind: Kind) -> None:
    """Raise ConfigError for a loss of preferences that learns from the other kind of rows."""
    wanted: Kind = "labelled" if loss == "kto" else "pairs"
    if kind != wanted:
        raise ConfigError(
            [f"train.loss={loss} learns from {wanted} rows, and these are {kind}"], hint=f"data.kind={wanted}"
        )


def check_under_head(kind: HeadKind, spec: TrainSpec) -> None:
    """Raise TrainingError for a trunk that cannot be cached: its states are found by the token ids of one text."""
    what = {"image": "images have none", "seq2seq": "an encoder-decoder has two texts"}
    if spec.trunk_cache and kind in what:
        raise TrainingError(
            f"train.trunk_cache finds states by a row's token ids, and {what[kind]}",
            expected="train.trunk_cache=false",
            hint="train.trunk_cache=false",
        )
