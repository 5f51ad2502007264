"""What a run trains, and the backbone with it inside: a fresh adapter, or one of the registry that is continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.data.chat import Example
from peftkit.events import Note, Report
from peftkit.registry.store import Version
from peftkit.tuning.attach import parent_spec, resume_adapter
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec, check_over
from peftkit.tuning.partial import dense_layers
from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True)
class ToTrain:
    """What will be trained over a base that is held in so many bits."""

    quant: QuantSpec
    adapter: AdapterSpec
    """As it will be: that of the parent, where there is one."""
    parent: Version | None
    asked: tuple[str, ...]
    """The settings of the adapter that were asked for, and that a parent must share."""


def to_train(adapter: AdapterSpec, quant: QuantSpec, parent: Version | None, sources: Mapping[str, str]) -> ToTrain:
    """Decide it before anything is planned or loaded.

    Asked for is what a user set (`sources`: dotted key → who set it; empty for a resumed run, where it was agreed when
    the run began), and the method that a recipe is written for.
    Raises TuningError for a parent that is something else, and for a method that does not go with the bits.
    """
    given = [key.removeprefix("adapter.") for key, source in sources.items() if source != "default"]
    asked = {key for key in given if key in type(adapter).model_fields}
    if sources:
        asked |= {"method"} & adapter.model_fields_set
    trained = parent_spec(parent, adapter, asked) if parent is not None else adapter
    check_over(trained, quant.bits)
    return ToTrain(quant, trained, parent, tuple(sorted(asked)))


def load_tuned(
    what: ToTrain,
    base: BaseSpec,
    located: LocatedBase,
    rows: Sequence[Example],
    cache: Path,
    *,
    other_base: bool,
    report: Report,
) -> Tuned:
    """Load the backbone and inject what is trained; `rows` are there for methods that look at them first."""
    dense = dense_layers(what.adapter)
    backbone = load_backbone(base, what.quant, cache, dense=dense, report=report, located=located)
    if what.parent is None:
        return inject(backbone, what.adapter, rows=rows, report=report)
    report(Note(f"continuing from {what.parent.reference}"))
    return resume_adapter(backbone, what.parent, what.adapter, asked=what.asked, other_base=other_base, report=report)
