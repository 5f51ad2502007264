"""Base and adapter side by side: intervals, the table that a user reads, the figures that a manifest keeps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftkit.data.audit import Part
from peftkit.data.formats import Row
from peftkit.data.template import Rendering
from peftkit.evaluation.behaviour.change import Behaved, BehaviourChange
from peftkit.evaluation.compare import Interval, mean_nll, paired_mean, paired_nll, wilson
from peftkit.evaluation.metrics import Score, by_group, summarise
from peftkit.evaluation.preflight import check_column
from peftkit.evaluation.retention import RetentionText
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.generation.requests import Completion

if TYPE_CHECKING:  # it imports torch
    from peftkit.evaluation.behaviour.asking import Asked


@dataclass(frozen=True)
class Measured:
    """One contestant's figures per row; lists follow the order of the held-out examples or rows."""

    name: str
    nll: list[float]
    """Summed answer NLL per example, nats."""
    retention: list[float]
    """Summed NLL per passage, nats; empty when retention is off."""
    answers: list[Completion]
    scores: list[Score]
    behaviour: Behaved | None = None
    """What it answered to the probes; None where it was not asked."""


@dataclass(frozen=True)
class Held:
    """What every contestant is measured on."""

    part: Part
    rendering: Rendering
    text: RetentionText | None
    metric: str
    metric_reason: str
    asked: Asked | None = None
    """The probes; None where nothing is asked."""

    @property
    def rows(self) -> list[Row]:
        """The rows that have something to measure: not those that the length policy left out."""
        return [self.part.rows[index] for index in sorted({example.row for example in self.part.examples})]

    @property
    def answer_tokens(self) -> list[int]:
        """Predicted answer tokens per example."""
        return [example.answer_tokens for example in self.part.examples]


@dataclass(frozen=True)
class Comparison:
    """Base against adapter on the same rows."""

    held: Held
    base: Measured
    adapter: Measured
    prompted: tuple[Measured, ...]
    """The base again, with instructions or solved examples in its prompt."""
    spec: EvaluateSpec

    @property
    def learned(self) -> Interval:
        """Change of answer NLL per token, adapter minus base; negative is better."""
        return paired_nll(self.base.nll, self.adapter.nll, self.held.answer_tokens)

    @property
    def forgotten(self) -> Interval | None:
        """Change of general-text NLL per token, adapter minus base; positive is worse."""
        if self.held.text is None:
            return None
        return paired_nll(self.base.retention, self.adapter.retention, self.held.text.tokens)

    @property
    def behaviour(self) -> BehaviourChange | None:
        """What changed on the probes; None where they were not asked."""
        if self.base.behaviour is None or self.adapter.behaviour is None:
            return None
        return BehaviourChange(self.base.behaviour, self.adapter.behaviour)

    def gained(self) -> Interval | None:
        """Change of the score against the best-prompted base; None when nothing was generated."""
        rival = max((m for m in (self.base, *self.prompted) if m.scores), key=_accuracy, default=None)
        if rival is None or not self.adapter.scores:
            return None
        return paired_mean([s.value for s in rival.scores], [s.value for s in self.adapter.scores])

    def objective(self) -> tuple[str, float, Literal["min", "max"]]:
        """What a search over settings goes by: the adapter's answer NLL."""
        return "answer_nll", mean_nll(self.adapter.nll, self.held.answer_tokens).point, "min"

    def figures(self) -> dict[str, dict[str, Any]]:
        """Numbers for the manifest: before, after, other. No row, no text."""
        other: dict[str, Any] = {"answer_nll_change": _interval(self.learned), "metric": self.held.metric}
        if self.forgotten is not None:
            other["retention_nll_change"] = _interval(self.forgotten)
        gained = self.gained()
        if gained is not None:
            other["score_change"] = _interval(gained)
        if (behaviour := self.behaviour) is not None:
            other["behaviour"] = behaviour.figures()
        other |= {measured.name: _figures(measured, self.held) for measured in self.prompted}
        if self.spec.group_by and self.adapter.scores:
            # How the groups are called stays in the run folder: a column may hold names of people.
            values = sorted(value for _, _, value in self.by_group(self.adapter))
            other["by_" + self.spec.group_by] = {
                "groups": len(values),
                "lowest": values[0],
                "median": values[len(values) // 2],
            }
        return {"before": _figures(self.base, self.held), "after": _figures(self.adapter, self.held), "other": other}

    def by_group(self, measured: Measured) -> list[tuple[str, int, float]]:
        """Scores per value of the `group_by` column. Raises DataError when a row has no such column."""
        column = str(self.spec.group_by)
        rows = self.held.rows[: len(measured.scores)]
        check_column(column, rows)
        return by_group(measured.scores, [str(row.columns[column]) for row in rows])

    def rows(self) -> list[tuple[Any, ...]]:
        """The table that a user reads: one line per contestant."""
        return [_line(m, self.held) for m in (self.base, *self.prompted, self.adapter)]

    def samples(self) -> list[dict[str, Any]]:
        """Answers side by side, for the run folder only: they contain the user's rows."""
        lines = []
        for i, (answer, row) in enumerate(zip(self.adapter.answers, self.held.rows, strict=False)):
            line: dict[str, Any] = {"where": str(row.where), "reference": reference(row)}
            for measured in (self.base, *self.prompted):
                if measured.answers:
                    line[measured.name] = measured.answers[i].text
            line |= {
                "adapter": answer.text,
                "score": self.adapter.scores[i].value,
                "detail": self.adapter.scores[i].detail,
            }
            lines.append(line)
        return lines + (self.behaviour.samples() if self.behaviour else [])


COLUMNS = ("", "answer NLL", "perplexity", "score", "95 %", "stops", "general NLL")


def reference(row: Row) -> str:
    """The answer that a row asks for."""
    return str(row.messages[-1].get("content") or "") if row.messages else str(row.text)


def _accuracy(measured: Measured) -> float:
    return sum(score.value for score in measured.scores) / len(measured.scores)


def _figures(measured: Measured, held: Held) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if measured.nll:
        figures["answer_nll"] = _interval(mean_nll(measured.nll, held.answer_tokens))
    if measured.retention and held.text:
        figures["retention_nll"] = _interval(mean_nll(measured.retention, held.text.tokens))
    if measured.scores:
        figures["score"] = {
            "metric": held.metric,
            **_without_invented(summarise(measured.scores), held.rows[: len(measured.scores)]),
        }
        figures["stopped"] = sum(answer.stopped for answer in measured.answers) / len(measured.answers)
    return figures


def _without_invented(summary: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Fields that no reference has are counted, not named: a base may answer with a customer's words as a key."""
    fields = summary.get("fields")
    if not fields:
        return summary
    asked = {name for row in rows for name in json.loads(reference(row))}
    known = {name: figures for name, figures in fields.items() if name in asked}
    return {**summary, "fields": known, "invented_fields": len(fields) - len(known)}


def _line(measured: Measured, held: Held) -> tuple[Any, ...]:
    nll = mean_nll(measured.nll, held.answer_tokens) if measured.nll else None
    general = mean_nll(measured.retention, held.text.tokens) if measured.retention and held.text else None
    score = band = stops = ""
    if measured.scores:
        n, hits = len(measured.scores), sum(score.value == 1 for score in measured.scores)
        bounds = wilson(hits, n)
        score, band = f"{hits}/{n}", f"{bounds.low:.0%}–{bounds.high:.0%}"
        stops = f"{sum(answer.stopped for answer in measured.answers)}/{n}"
    return (
        measured.name,
        f"{nll.point:.3f}" if nll else "",
        f"{_exp(nll.point):.2f}" if nll else "",
        score,
        band,
        stops,
        f"{general.point:.3f}" if general else "",
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 50.0))


def _interval(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON; the infinite ends that a single row gives become null."""
    ends = (interval.point, interval.low, interval.high)
    return {name: end if math.isfinite(end) else None for name, end in zip(("point", "low", "high"), ends, strict=True)}
