"""The groups of settings that a recipe has, found by their type: a user's recipe may name its fields as it likes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.config import Spec
from peftkit.data.audit import DataSpec
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.data.tasks.spec import TaskSpec
from peftkit.errors import ConfigError
from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.spec import TrainSpec
from peftkit.tuning.methods import AdapterSpec

T = TypeVar("T", bound=Spec)


@dataclass(frozen=True)
class Groups:
    """What a run is planned from."""

    base: BaseSpec
    quant: QuantSpec
    adapter: AdapterSpec
    data: Any
    """DataSpec, TaskSpec or PreferenceSpec."""
    train: TrainSpec
    evaluate: Any
    """EvaluateSpec, or that of tasks or preferences."""
    names: dict[str, str]
    """Group → the field of the recipe's Config that holds it."""


_KINDS: dict[str, tuple[type[Spec], ...]] = {
    "base": (BaseSpec,),
    "quant": (QuantSpec,),
    "adapter": (AdapterSpec,),
    "data": (DataSpec, TaskSpec, PreferenceSpec),
    "train": (TrainSpec, PreferenceTrainSpec),
    "evaluate": (EvaluateSpec, TaskEvaluateSpec, PreferenceEvaluateSpec),
}


def by_kind(config: Any) -> dict[str, Any]:
    """A recipe's settings as plain values, its groups under our names for them."""
    plain = config.model_dump(mode="json")
    kinds = {name: type(getattr(config, name)) for name in plain}
    ours: dict[Any, str] = {kind: group for group, kinds in _KINDS.items() for kind in kinds}
    return {ours.get(kinds[name], name): value for name, value in plain.items()}


def groups(config: Any) -> Groups:
    """The groups of a recipe's settings. Raises ConfigError naming what a recipe lacks to be planned."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    for group, kinds in _KINDS.items():
        name = next((name for name, value in fields.items() if type(value) in kinds), None)
        if name is None and group != "evaluate":
            needed = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError([f"the recipe has no {needed} among its settings, so it cannot be planned"])
        names[group] = name or group
        found[group] = fields[name] if name else EvaluateSpec()
    return Groups(**found, names=names)


def groups_with(config: Any, **given: Spec) -> Groups:
    """The groups that a recipe handed to a verb, and the others from its settings or their defaults."""
    fields = [getattr(config, name) for name in type(config).model_fields]
    data = next((value for value in fields if type(value) in _KINDS["data"]), DataSpec())
    evaluate = next((value for value in fields if type(value) in _KINDS["evaluate"]), EvaluateSpec())
    return Groups(**{"data": data, "evaluate": evaluate, **given}, names={})  # type: ignore[arg-type]
