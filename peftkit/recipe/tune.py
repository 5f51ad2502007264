"""The backbone with what a run trains inside: a fresh adapter, or one of the registry that is continued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftkit.backbone.load import load_backbone
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.data.chat import Example
from peftkit.events import Note, Report
from peftkit.recipe.to_train import ToTrain
from peftkit.tuning.attach import resume_adapter
from peftkit.tuning.inject import inject
from peftkit.tuning.partial import dense_layers
from peftkit.tuning.tuned import Tuned


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
