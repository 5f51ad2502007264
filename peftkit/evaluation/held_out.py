"""Base against adapter on the same held-out rows and on general text: likelihood, answers, what was forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.data.audit import Part
from peftkit.data.chat import Rendering, prompt_for
from peftkit.data.formats import Row
from peftkit.errors import DataError
from peftkit.evaluation.compare import Interval, mean_nll, paired_mean, paired_nll, wilson
from peftkit.evaluation.metrics import METRICS, Score, by_group, choose, summarise
from peftkit.evaluation.retention import RetentionText, load_text
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Note, Phase, Progress, Report, silent
from peftkit.generation.engine import Completion, generate
from peftkit.generation.forward import autocast, row_nll


@dataclass(frozen=True)
class Contestant:
    """Something to measure: a name, and how to make its model current."""

    name: str
    using: Callable[[], AbstractContextManager[Any]]


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


@dataclass(frozen=True)
class Held:
    """What every contestant is measured on."""

    part: Part
    rendering: Rendering
    text: RetentionText | None
    metric: str
    metric_reason: str

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

    def gained(self) -> Interval | None:
        """Change of the score against the best-prompted base; None when nothing was generated."""
        rival = max((m for m in (self.base, *self.prompted) if m.scores), key=_accuracy, default=None)
        if rival is None or not self.adapter.scores:
            return None
        return paired_mean([s.value for s in rival.scores], [s.value for s in self.adapter.scores])

    def figures(self) -> dict[str, dict[str, Any]]:
        """Numbers for the manifest: before, after, other. No row, no text."""
        other: dict[str, Any] = {"answer_nll_change": _interval(self.learned), "metric": self.held.metric}
        if self.forgotten is not None:
            other["retention_nll_change"] = _interval(self.forgotten)
        gained = self.gained()
        if gained is not None:
            other["score_change"] = _interval(gained)
        other |= {measured.name: _figures(measured, self.held) for measured in self.prompted}
        if self.spec.group_by and self.adapter.scores:
            other["by_" + self.spec.group_by] = {
                group: {"rows": n, "score": value} for group, n, value in self.by_group(self.adapter)
            }
        return {"before": _figures(self.base, self.held), "after": _figures(self.adapter, self.held), "other": other}

    def by_group(self, measured: Measured) -> list[tuple[str, int, float]]:
        """Scores per value of the `group_by` column. Raises DataError when a row has no such column."""
        column = str(self.spec.group_by)
        rows = self.held.rows[: len(measured.scores)]
        missing = [str(row.where) for row in rows if column not in row.columns]
        if missing:
            raise DataError(
                f"evaluate.group_by={column}, but {missing[0]} has no such column",
                expected="one of: " + ", ".join(sorted(rows[0].columns)) if rows[0].columns else "a column of the rows",
            )
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
        return lines


COLUMNS = ("", "answer NLL", "perplexity", "score", "95 %", "stops", "general NLL")


def reference(row: Row) -> str:
    """The answer that a row asks for."""
    return str(row.messages[-1].get("content") or "") if row.messages else str(row.text)


def prepare(part: Part, rendering: Rendering, spec: EvaluateSpec, backbone: Backbone, report: Report) -> Held:
    """Choose the metric and read the retention text."""
    text = None
    if spec.retention:
        text = load_text(spec.retention, backbone.tokenizer, limit=spec.retention_passages)
    metric, reason = spec.metric, "asked for"
    if metric == "auto":
        chosen, reason = choose([reference(row) for row in part.rows], [row.columns for row in part.rows])
        report(Note(f"score: {chosen} ({reason})"))
        return Held(part, rendering, text, chosen, reason)
    return Held(part, rendering, text, metric, reason)


def measure(
    contestant: Contestant,
    held: Held,
    spec: EvaluateSpec,
    backbone: Backbone,
    *,
    likelihood: bool = True,
    prompts: Sequence[list[int]] | None = None,
    report: Report = silent,
) -> Measured:
    """Measure one contestant; `prompts` replaces the plain prompts of the generated rows, [] generates nothing."""
    device, tokenizer = backbone.device, backbone.tokenizer
    if prompts is None:
        rows = held.rows[: spec.max_generated_rows]
        prompts = [prompt_for(row, tokenizer, held.rendering) for row in rows if row.text is None]
    report(Phase(f"measure {contestant.name}", len(prompts) or None, "answers"))
    nll: list[float] = []
    retention: list[float] = []
    with contestant.using() as model, autocast(device, backbone.placement.compute_dtype):
        options = {"pad_id": tokenizer.pad_id, "device": device, "batch_size": spec.batch_size}
        if likelihood:
            nll = row_nll(model, held.part.examples, **options)
            retention = row_nll(model, held.text.passages, **options) if held.text else []
        answers = generate(
            model,
            prompts,
            tokenizer,
            device=device,
            max_new_tokens=spec.max_new_tokens,
            batch_size=spec.batch_size,
            progress=lambda done: report(Progress(done, {})),
        )
    rows = held.rows[: len(answers)]
    metric = METRICS[held.metric]
    scores = [metric(answer.text, reference(row), row.columns) for answer, row in zip(answers, rows, strict=True)]
    return Measured(contestant.name, nll, retention, answers, scores)


def compare(
    base: Contestant,
    adapter: Contestant,
    held: Held,
    spec: EvaluateSpec,
    backbone: Backbone,
    *,
    train_rows: Sequence[Row] = (),
    before: Measured | None = None,
    prompted: tuple[Measured, ...] | None = None,
    report: Report = silent,
) -> Comparison:
    """Measure base and adapter on the same rows; `before` and `prompted` reuse figures of the base taken earlier."""
    rows = [row for row in held.rows[: spec.max_generated_rows] if row.text is None]
    prompted_sets = _prompted(rows, train_rows, held.rendering, spec, backbone)
    plain: list[list[int]] | None = [] if prompted_sets else None
    before = before or measure(base, held, spec, backbone, prompts=plain, report=report)
    if prompted is None:
        prompted = tuple(
            measure(
                Contestant(name, base.using), held, spec, backbone, likelihood=False, prompts=prompts, report=report
            )
            for name, prompts in prompted_sets
        )
    after = measure(adapter, held, spec, backbone, report=report)
    return Comparison(held, before, after, prompted, spec)


def _prompted(
    rows: Sequence[Row], train_rows: Sequence[Row], rendering: Rendering, spec: EvaluateSpec, backbone: Backbone
) -> list[tuple[str, list[list[int]]]]:
    """Prompts that give an untrained base its best chance: instructions, and instructions with solved examples."""
    if not rows:
        return []
    text = _instructions(spec.instructions)
    shots = [row for row in train_rows if row.text is None][: spec.shots]
    tokenizer = backbone.tokenizer
    sets = []
    if text:
        prompts = [prompt_for(row, tokenizer, rendering, instructions=text) for row in rows]
        sets.append(("base + instructions", prompts))
    if shots:
        prompts = [prompt_for(row, tokenizer, rendering, instructions=text, shots=shots) for row in rows]
        sets.append((f"base + {len(shots)} examples", prompts))
    return sets


def _instructions(given: str | None) -> str | None:
    if given is None:
        return None
    path = Path(given)
    try:
        is_file = path.is_file()
    except OSError:  # a text too long to be a file name
        is_file = False
    if is_file:
        return path.read_text(encoding="utf-8").strip()
    if "\n" not in given and " " not in given:
        raise DataError(
            f"evaluate.instructions={given} is neither a file nor a sentence",
            expected="a text file that exists, or the instructions themselves",
        )
    return given


def _accuracy(measured: Measured) -> float:
    return sum(score.value for score in measured.scores) / len(measured.scores)


def _figures(measured: Measured, held: Held) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if measured.nll:
        figures["answer_nll"] = _interval(mean_nll(measured.nll, held.answer_tokens))
    if measured.retention and held.text:
        figures["retention_nll"] = _interval(mean_nll(measured.retention, held.text.tokens))
    if measured.scores:
        figures["score"] = {"metric": held.metric, **_without_invented(summarise(measured.scores), held)}
        figures["stopped"] = sum(answer.stopped for answer in measured.answers) / len(measured.answers)
    return figures


def _without_invented(summary: dict[str, Any], held: Held) -> dict[str, Any]:
    """Fields that no reference has are counted, not named: a base may answer with a customer's words as a key."""
    fields = summary.get("fields")
    if not fields:
        return summary
    asked = {name for row in held.rows for name in json.loads(reference(row))}
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
