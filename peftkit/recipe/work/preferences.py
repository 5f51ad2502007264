"""Preferences: pairs of answers, or answers that are wanted or not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.base.head import Head
from peftkit.base.ref import longest_sequence, read_config
from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.preference.audit import PreferenceAudit, audit_preference
from peftkit.data.preference.example import PreferenceExample
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.errors import ConfigError
from peftkit.evaluation.held_out import Contestant
from peftkit.evaluation.preference import PreferenceComparison, PreferenceEvaluateSpec, compare_preference
from peftkit.events import Note, Report, Table
from peftkit.recipe.keeping import keep_json
from peftkit.recipe.work.kinds import Place
from peftkit.runs import RunFolder
from peftkit.training.preference.paths import PreferencePaths, preference_paths
from peftkit.training.preference.reference import reference_scored
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.row_rules import check_loss
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned


class Preferences:
    """Rows that say which answer is better; the reference is the base, its adapter detached."""

    def __init__(self) -> None:
        self._paths: PreferencePaths | None = None
        self._scored = False

    def audit(self, place: Place, spec: PreferenceSpec, evaluate: Any) -> PreferenceAudit:
        """Read, render, check and count the rows."""
        tokenizer = load_tokenizer(place.located.folder)
        limit = longest_sequence(read_config(place.located.folder))
        return audit_preference(spec, tokenizer, limit, place.report, place.cache)

    def head(self, data: PreferenceAudit) -> Head | None:
        """The language head stays."""
        return None

    def prepare(self, place: Place, backbone: Backbone, way: Any) -> None:
        """Nothing."""

    def besides(self) -> dict[str, Any]:
        """Nothing: the reference is the base."""
        return {}

    def paths(self, place: Place, tuned: Tuned, data: PreferenceAudit, train: TrainSpec) -> PreferencePaths:
        """Those of preferences; before the rows are scored, for trying what they take."""
        if self._paths is None:
            if not isinstance(train, PreferenceTrainSpec):
                raise ConfigError(["train: settings of supervised training; preferences need PreferenceTrainSpec"])
            check_loss(train.loss, "labelled" if data.train.examples[0].rejected is None else "pairs")
            self._paths = preference_paths(tuned, train, place.report)
        return self._paths if self._scored else replace(self._paths, tries_memory=True)

    def rows(
        self, place: Place, tuned: Tuned, data: PreferenceAudit
    ) -> tuple[Sequence[PreferenceExample], Sequence[PreferenceExample]]:
        """Scored under the base, once."""
        if self._paths is None:
            raise ConfigError(["run.plan was not called before run.train"])
        paths, self._scored = self._paths, True
        train, held_out = (
            reference_scored(tuned, part.examples, paths, place.report) for part in (data.train, data.held_out)
        )
        return train, held_out

    def compare(
        self, place: Place, tuned: Tuned, data: PreferenceAudit, spec: PreferenceEvaluateSpec
    ) -> PreferenceComparison:
        """Which answers base and adapter prefer, and general text."""
        base, adapter = Contestant("base", tuned.as_base), Contestant("adapter", lambda: nullcontext(tuned.model))
        return compare_preference(base, adapter, data.held_out.examples, spec, tuned.backbone, report=place.report)

    def tell(self, comparison: PreferenceComparison, report: Report) -> None:
        """The table, and whether the adapter ranks better than chance."""
        report_preferences(comparison, report)

    def keep(self, comparison: PreferenceComparison, folder: RunFolder, report: Report) -> None:
        """The rewards of every row."""
        keep_json(folder, "samples.json", comparison.samples(), report)

    def sources(self, comparison: PreferenceComparison) -> Sequence[dict[str, Any]]:
        """The text of retention."""
        return [comparison.text.record] if comparison.text is not None else []


def report_preferences(comparison: PreferenceComparison, report: Report, name: str | None = None) -> None:
    """Report a comparison the way every command shows it, under the adapter's name where there are several."""
    title = f"held-out preferences{f', {name}' if name else ''}"
    report(Table(title, comparison.COLUMNS, tuple(comparison.rows())))
    found = comparison.accuracy
    words = "more often than chance" if found.low > 0.5 else "not shown to do so more often than chance"
    report(
        Note(
            f"the adapter prefers the better answer in {found.point:.0%} ({found.low:.0%}–{found.high:.0%}) of "
            f"{found.n:,}: {words}"
        )
    )
    if comparison.forgotten is not None and comparison.forgotten.low > 0:
        report(Note(f"general text became less likely, by {comparison.forgotten.point:.3f} nats per token"))
