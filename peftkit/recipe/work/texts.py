"""Texts to write, translations and summaries: asked of a base that chats, or decoded by an encoder-decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from peftkit.base.head import Head
from peftkit.base.ref import longest_sequence, read_config
from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.tasks.asked import AskedAudit, audit_asked
from peftkit.data.tasks.audit import TaskAudit
from peftkit.data.tasks.spec import TaskSpec
from peftkit.evaluation.answered import BASE, AnsweredComparison, beside_base, compare_answered, decoded
from peftkit.evaluation.held_out import Contestant
from peftkit.evaluation.tasks.comparison import ADAPTER, TaskComparison
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Report
from peftkit.recipe.work.kinds import Place
from peftkit.recipe.work.tasks import Tasks, report_task
from peftkit.render import interval
from peftkit.training.passes.paths import Paths
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned


class Texts(Tasks):
    """Rows of a source and a target text; what the base is decides, when it is found, how they are learned."""

    def audit(self, place: Place, spec: TaskSpec, evaluate: Any) -> TaskAudit | AskedAudit:  # type: ignore[override]
        """As sources and targets for an encoder-decoder, as conversations for any other base."""
        config = read_config(place.located.folder)
        if config.get("is_encoder_decoder"):
            return super().audit(place, spec, evaluate)
        return audit_asked(spec, load_tokenizer(place.located.folder), longest_sequence(config), place.report)

    def head(self, data: TaskAudit | AskedAudit) -> Head | None:
        """The decoder; of a base that chats the language head stays."""
        return None if isinstance(data, AskedAudit) else data.head

    def paths(self, place: Place, tuned: Tuned, data: TaskAudit | AskedAudit, train: TrainSpec) -> Paths | None:
        """Those of the decoder; of conversations training finds them itself."""
        return None if isinstance(data, AskedAudit) else super().paths(place, tuned, data, train)

    def rows(self, place: Place, tuned: Tuned, data: TaskAudit | AskedAudit) -> tuple[Sequence[Any], Sequence[Any]]:
        """As they were encoded."""
        return data.train.examples, data.held_out.examples

    def compare(  # type: ignore[override]
        self, place: Place, tuned: Tuned, data: TaskAudit | AskedAudit, spec: TaskEvaluateSpec
    ) -> TaskComparison | AnsweredComparison:
        """What the adapter writes beside what is trivial, and beside what the base writes without it."""
        base = Contestant(BASE, tuned.as_base)
        if not isinstance(data, AskedAudit):
            comparison = super().compare(place, tuned, data, spec)
            return beside_base(comparison, decoded(comparison, base, tuned.backbone, report=place.report))
        adapter = Contestant(ADAPTER, lambda: contextlib.nullcontext(tuned.model))
        options: dict[str, Any] = {"train_rows": data.train_rows, "report": place.report}
        return compare_answered(base, adapter, data.measured, spec, tuned.backbone, **options)

    def tell(self, comparison: TaskComparison | AnsweredComparison, report: Report) -> None:
        """The table and the verdict, and how likelihood changed."""
        if not isinstance(comparison, AnsweredComparison):
            super().tell(comparison, report)
        else:
            report_answered(comparison, report)

    def sources(self, comparison: TaskComparison | AnsweredComparison) -> Sequence[dict[str, Any]]:
        """The text of retention, where general text was measured."""
        text = comparison.likelihood.held.text if isinstance(comparison, AnsweredComparison) else None
        return [text.record] if text is not None else []


def report_answered(comparison: AnsweredComparison, report: Report, name: str | None = None) -> None:
    """Report what was written, under the adapter's name where there are several, and how likelihood changed."""
    report_task(comparison.scored, report, name)
    likelihood = comparison.likelihood
    for what, change in (("wanted", likelihood.learned), ("general", likelihood.forgotten)):
        if change is not None:
            shown = interval(change.point, change.low, change.high)
            report(Note(f"NLL per token of {what} text, adapter − base: {shown} (95 %)"))
    report(Note("the adapter ends {:,} of {:,} texts by itself".format(*comparison.stopped)))
