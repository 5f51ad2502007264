"""The backbone with what a run trains inside: a fresh adapter, or one of the registry that is continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.data.chat import Example
from peftkit.events import Note, Report
from peftkit.recipe.to_train import ToTrain
from peftkit.tuning.attach import check_same_head, resume_adapter
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
    head: Head | None = None,
    prepare: Callable[[Backbone], None] = lambda backbone: None,
    other_base: bool,
    report: Report,
) -> Tuned:
    """Load the backbone, with the head of a task, and inject what is trained; some methods look at `rows` first.

    `prepare` is called with the bare backbone.
    """
    if what.parent is not None:
        check_same_head(what.parent, head)
    dense = dense_layers(what.adapter)
    seed = what.adapter.seed
    backbone = load_backbone(base, what.quant, cache, head=head, seed=seed, dense=dense, report=report, located=located)
    prepare(backbone)
    if what.parent is None:
        return inject(backbone, what.adapter, rows=rows, report=report)
    report(Note(f"continuing from {what.parent.reference}"))
    return resume_adapter(backbone, what.parent, what.adapter, asked=what.asked, other_base=other_base, report=report)
