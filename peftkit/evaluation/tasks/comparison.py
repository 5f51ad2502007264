"""Trivial baselines, the prompted base and the adapter side by side: table, manifest figures, samples, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from peftkit.base.head import Head
from peftkit.data.tasks.task import Answer, Prediction, TaskName, TaskPart, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.compare import Interval
from peftkit.evaluation.tasks.resample import record
from peftkit.evaluation.tasks.scores import Scores, difference, score
from peftkit.evaluation.tasks.slices import Slices, by_column, check_columns
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Warned

COLUMNS = ("", "metric", "score", "95 %", "also", "ECE", "rows")
ADAPTER = "adapter"
T = TypeVar("T")
_SECOND = {
    "macro_f1": "accuracy",
    "micro_f1": "subset_accuracy",
    "rmse": "pearson",
    "span_f1": "token_accuracy",
    "token_accuracy": "macro_f1",
    "f1": "exact_match",
    "chrf": "bleu",
    "rougeL": "rouge1",
}
"""What stands beside the metric that ranks."""


def measured(part: TaskPart, per_row: Sequence[T]) -> list[T]:
    """Of one thing per row of `part`, those of the rows that are measured: not of those that were too long."""
    return [per_row[index] for index in sorted({example.row for example in part.examples})]


def measured_rows(part: TaskPart) -> list[TaskRow]:
    """The rows that every contestant is measured on: those with a sequence."""
    return measured(part, part.rows)


@dataclass(frozen=True)
class Lead:
    """How far the adapter is ahead of a rival on the rows that the rival answered."""

    rival: str
    change: Interval
    """Of the metric that ranks, adapter minus rival."""
    ahead: float
    """The same, positive where the adapter is better."""
    rows: int


@dataclass(frozen=True)
class TaskComparison:
    """Contestants on the same held-out rows, the adapter last."""

    task: TaskName
    head: Head
    held: TaskPart
    contestants: dict[str, list[Prediction]]
    """Predictions for `measured_rows(held)` by name; a contestant may stop early and is then compared on its rows."""
    spec: TaskEvaluateSpec

    def __post_init__(self) -> None:
        count = len(self.measured)
        problems = [
            f"{name}: {len(given)} predictions for {count} rows"
            for name, given in self.contestants.items()
            if not 0 < len(given) <= count or (name == ADAPTER and len(given) < count)
        ]
        if problems or list(self.contestants)[-1:] != [ADAPTER]:
            problems = problems or [f"the last contestant is not {ADAPTER!r}: {', '.join(self.contestants) or 'none'}"]
            raise DataError("; ".join(problems), expected="the adapter last, with a prediction for each measured row")
        check_columns(self.measured, self.spec.slices)

    @cached_property
    def measured(self) -> list[TaskRow]:
        """The held-out rows that were measured."""
        return measured_rows(self.held)

    @cached_property
    def _scores(self) -> dict[str, Scores]:
        return {
            name: score(self.task, self.head, self.measured[: len(given)], given, self.spec)
            for name, given in self.contestants.items()
        }

    def scores(self, name: str) -> Scores:
        """The figures of one contestant."""
        return self._scores[name]

    @cached_property
    def lead(self) -> Lead | None:
        """Ahead of the best rival: the one that the adapter leads by least; None where none can be compared with."""
        leads = [self._lead(name) for name in self.contestants if name != ADAPTER]
        return min((lead for lead in leads if lead), key=lambda lead: lead.ahead, default=None)

    def _lead(self, rival: str) -> Lead | None:
        given, own = self.contestants[rival], self.scores(ADAPTER)
        count = len(given)
        change = difference(
            self.task,
            self.head,
            self.measured[:count],
            given,
            self.contestants[ADAPTER][:count],
            own.primary,
            self.spec,
        )
        if change is None:
            return None
        return Lead(rival, change, change.point if own.higher_is_better else -change.point, count)

    @cached_property
    def slices(self) -> list[Slices]:
        """The adapter's score by each column that was asked for; names of groups belong in the run folder."""
        given = self.contestants[ADAPTER]
        return [by_column(self.task, self.head, self.measured, given, column, self.spec) for column in self.spec.slices]

    def figures(self) -> dict[str, dict[str, Any]]:
        """Numbers for the manifest: the best rival before, the adapter after, and the others. No row, no text."""
        adapter, lead = self.scores(ADAPTER), self.lead
        rivals = {name: self.scores(name).record() for name in self.contestants if name != ADAPTER}
        other: dict[str, Any] = {"metric": adapter.primary, "higher_is_better": adapter.higher_is_better}
        if lead:
            other |= {"score_change": record(lead.change), "best_baseline": lead.rival, "compared_rows": lead.rows}
        if rivals:
            other["baselines"] = rivals
        other |= {"by_" + each.column: each.record() for each in self.slices}
        return {"before": rivals[lead.rival] if lead else {}, "after": adapter.record(), "other": other}

    def rows(self) -> list[tuple[Any, ...]]:
        """The table that a user reads: one line per contestant; the columns are `COLUMNS`."""
        return [_line(name, self.scores(name)) for name in self.contestants]

    def samples(self) -> list[dict[str, Any]]:
        """Predictions side by side, for the run folder only: they contain the user's rows.

        `correct` says whether the adapter is right; None for numbers and free texts, which are better or worse.
        """
        per_row = self.scores(ADAPTER).per_row
        exact = self.task not in ("regression", "translation", "summarization")
        lines = []
        for i, row in enumerate(self.measured):
            line: dict[str, Any] = {"where": str(row.where), "reference": _plain(row.target)}
            line |= {name: _plain(given[i].value) for name, given in self.contestants.items() if i < len(given)}
            own = per_row[i] if per_row else None
            lines.append(line | {"score": own, "correct": own == 1.0 if exact and own is not None else None})
        return lines

    def objective(self) -> tuple[str, float | None, Literal["max", "min"]]:
        """What a search over settings goes by: the metric, the adapter's value, and which way is better."""
        adapter = self.scores(ADAPTER)
        return adapter.primary, adapter.value, "max" if adapter.higher_is_better else "min"

    def verdict(self) -> Note | Warned:
        """Whether the adapter beats the best rival over the whole interval, in one sentence."""
        lead = self.lead
        if lead is None:
            return Warned(
                "no baseline stands beside the adapter: its score alone does not say that training was needed"
            )
        own, rival = self._on_rival_rows(lead)
        figures = f"{self.scores(ADAPTER).primary} {own} against {rival}, difference {_signed(lead.change)}"
        where = "" if lead.rows == len(self.measured) else f" on the first {lead.rows} rows"
        if lead.ahead > 0 and lead.change.excludes(0.0):
            return Note(f"the adapter beats the best baseline, {lead.rival}{where}: {figures}")
        return Warned(
            f"the adapter does not beat the best baseline, {lead.rival}{where}: {figures}",
            hint="more training rows, another rate or a larger base; or use the baseline",
        )

    def _on_rival_rows(self, lead: Lead) -> tuple[str, str]:
        rival = self.scores(lead.rival).value
        assert rival is not None  # a lead exists only where both are defined
        return f"{rival + lead.change.point:.3f}", f"{rival:.3f}"


def _line(name: str, found: Scores) -> tuple[Any, ...]:
    metric = found.metrics[found.primary]
    second = _SECOND.get(found.primary, "")
    beside = found.metrics.get(second)
    ece = found.metrics.get("ece")
    return (
        name,
        found.primary,
        f"{metric.point:.3f}" if metric else "not defined",
        f"{metric.low:.3f} … {metric.high:.3f}" if metric else "",
        f"{second} {beside.point:.3f}" if beside else "",
        f"{ece.point:.3f}" if ece else "",
        found.n,
    )


def _signed(change: Interval) -> str:
    return f"{change.point:+.3f} ({change.low:+.3f} … {change.high:+.3f})"


def _plain(value: Any) -> Any:
    """A target or prediction for JSON."""
    if isinstance(value, Answer):
        return value.text
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
