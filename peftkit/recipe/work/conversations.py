"""Conversations and texts: the work of supervised fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.base.head import Head
from peftkit.base.ref import longest_sequence, read_config
from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.audit import Audit, DataSpec, audit
from peftkit.evaluation.held_out import Comparison
from peftkit.evaluation.preflight import preflight
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Report
from peftkit.recipe.keeping import keep_json
from peftkit.recipe.showing import report_comparison
from peftkit.recipe.work.kinds import Place
from peftkit.runs import RunFolder
from peftkit.training.distil.paths import distil_paths
from peftkit.training.distil.spec import TEACHER_UNPLANNED, DistilSpec
from peftkit.training.distil.teacher import Teacher, teacher_of
from peftkit.training.passes.paths import Paths
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned


class Conversations:
    """Rows with answers, or plain text."""

    def audit(self, place: Place, spec: DataSpec, evaluate: Any) -> Audit:
        """Read, render, check and count the rows."""
        tokenizer = load_tokenizer(place.located.folder)
        limit = longest_sequence(read_config(place.located.folder))
        data = audit(spec, tokenizer, limit, place.report, place.cache)
        if isinstance(evaluate, EvaluateSpec):
            preflight(evaluate, data.held_out.rows, tokenizer)
        return data

    def head(self, data: Audit) -> Head | None:
        """The language head stays."""
        return None

    def __init__(self) -> None:
        self._teacher: Teacher | None = None
        self._distil = DistilSpec()

    def prepare(self, place: Place, backbone: Backbone, way: Any) -> None:
        """Load the teacher, where the recipe distils one."""
        if isinstance(way, DistilSpec):
            registry = place.registry
            place.report(TEACHER_UNPLANNED)
            self._distil = way
            self._teacher = teacher_of(way, backbone, place.cache, registry=registry, report=place.report)

    def besides(self) -> dict[str, Any]:
        """The teacher."""
        return {"teacher": self._teacher.record()} if self._teacher is not None else {}

    def paths(self, place: Place, tuned: Tuned, data: Audit, train: TrainSpec) -> Paths | None:
        """Found by training itself; with a teacher, those of distillation."""
        if self._teacher is None:
            return None
        return distil_paths(tuned, self._teacher, self._distil, train, place.report)

    def rows(self, place: Place, tuned: Tuned, data: Audit) -> tuple[Sequence[Any], Sequence[Any]]:
        """As they were encoded."""
        return data.train.examples, data.held_out.examples

    def compare(self, place: Place, tuned: Tuned, data: Audit, spec: EvaluateSpec) -> Comparison:
        """Base and adapter: likelihood, answers, general text."""
        from peftkit.evaluation import held_out

        held = held_out.prepare(data.held_out, data.rendering, spec, tuned.backbone, place.report)
        return held_out.compare(
            held_out.Contestant("base", tuned.as_base),
            held_out.Contestant("adapter", lambda: contextlib.nullcontext(tuned.model)),
            held,
            spec,
            tuned.backbone,
            train_rows=[data.train.rows[index] for index in sorted({row.row for row in data.train.examples})],
            report=place.report,
        )

    def tell(self, comparison: Comparison, report: Report) -> None:
        """The tables and intervals."""
        report_comparison(comparison, report)

    def keep(self, comparison: Comparison, folder: RunFolder, report: Report) -> None:
        """Answers, and scores by group."""
        keep_json(folder, "samples.json", comparison.samples(), report)
        if comparison.spec.group_by and comparison.adapter.scores:
            columns = ("group", "rows", "score")
            groups = [dict(zip(columns, group, strict=True)) for group in comparison.by_group(comparison.adapter)]
            keep_json(folder, "groups.json", groups, report)

    def sources(self, comparison: Comparison) -> Sequence[dict[str, Any]]:
        """The text of retention."""
        return [comparison.held.text.record] if comparison.held.text is not None else []
