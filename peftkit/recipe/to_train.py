"""What a run trains, decided before anything is planned or loaded: plan, budget and run ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftkit.backbone.spec import QuantSpec
from peftkit.config import Resolved
from peftkit.events import Warned
from peftkit.recipe.groups import Groups, groups
from peftkit.registry.store import Registry, Version
from peftkit.training.method_rules import check_method
from peftkit.training.row_rules import check_rows
from peftkit.training.spec import TrainSpec
from peftkit.tuning.methods import METHODS, AdapterSpec, check_over
from peftkit.tuning.parents import parent_spec


@dataclass(frozen=True)
class ToTrain:
    """What will be trained over a base that is held in so many bits."""

    quant: QuantSpec
    adapter: AdapterSpec
    """As it will be: that of the parent, where there is one."""
    parent: Version | None
    asked: tuple[str, ...]
    """The settings of the adapter that were asked for, and that a parent must share."""


def to_train(
    adapter: AdapterSpec, quant: QuantSpec, train: TrainSpec, parent: Version | None, sources: Mapping[str, str]
) -> ToTrain:
    """Decide it; this needs no torch.

    Asked for is what a user set (`sources`: dotted key → who set it; empty for a resumed run, where it was agreed when
    the run began), and the method that a recipe is written for.
    Raises TuningError for a parent that is something else, and for a method that does not go with the bits;
    TrainingError for one that does not go with the settings of training.
    """
    given = [key.removeprefix("adapter.") for key, source in sources.items() if source != "default"]
    asked = {key for key in given if key in type(adapter).model_fields}
    if sources:
        asked |= {"method"} & adapter.model_fields_set
    trained = parent_spec(parent, adapter, asked) if parent is not None else adapter
    check_over(trained, quant.bits)
    check_method(trained, train)
    return ToTrain(quant, trained, parent, tuple(sorted(asked)))


def foreign_rate(resolved: Resolved[Any]) -> Warned | None:
    """A warning where a recipe's rate is kept with a method that is not the recipe's: rates differ by up to 1,000."""
    given, own = groups(resolved.config), groups(type(resolved.config)())
    rate, method = given.train.learning_rate, given.adapter.method
    set_by_user = resolved.sources.get(f"{given.names['train']}.learning_rate", "default") != "default"
    if set_by_user or rate is None or method == own.adapter.method or rate == METHODS[method].learning_rate:
        return None
    return Warned(
        f"train.learning_rate={rate:g} is this recipe's rate for {own.adapter.method}, and adapter.method={method} "
        f"has one of its own, {METHODS[method].learning_rate:g}",
        "train.learning_rate=null takes the method's own; give a number to choose one",
    )


def groups_to_train(resolved: Resolved[Any], registry: Registry, *, resumed: bool = False) -> Groups:
    """The groups of a recipe's settings, with the adapter that will be trained: that of `init_from`, if it names one.

    The settings of a resumed run were agreed when it began, so none counts as asked for. Raises what `to_train` raises
    and for rows that cannot be trained on so, and ConfigError for a recipe that cannot be planned.
    """
    given = groups(resolved.config)
    init_from = getattr(resolved.config, "init_from", None)
    parent = registry.resolve(init_from) if init_from else None
    what = to_train(given.adapter, given.quant, given.train, parent, {} if resumed else resolved.sources)
    check_rows(given.data, given.train)
    return replace(given, adapter=what.adapter)
