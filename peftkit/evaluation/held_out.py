"""Base against adapter on the same held-out rows and on general text: likelihood, answers, what was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.data.audit import Part
from peftkit.data.chat import prompt_for
from peftkit.data.formats import Row
from peftkit.data.template import Rendering
from peftkit.evaluation.behaviour.asking import Asked, behave, prepare_behaviour, with_recall
from peftkit.evaluation.behaviour.change import Behaved
from peftkit.evaluation.comparison import COLUMNS, Comparison, Held, Measured, reference
from peftkit.evaluation.metrics import METRICS, choose
from peftkit.evaluation.preflight import read_instructions
from peftkit.evaluation.retention import load_text
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Note, Phase, Progress, Report, Warned, silent
from peftkit.generation.forward import autocast, row_nll
from peftkit.generation.generate import generate
from peftkit.generation.limits import positions_of
from peftkit.generation.requests import Completion

ANSWERS_PER_ROW = 3
"""Answers that are generated at once, for each row that is measured at once: they hold keys and values only, and a step
of 48 answers takes little more than one of 16 (docs/decisions/0016)."""


@dataclass(frozen=True)
class Contestant:
    """Something to measure: a name, and how to make its model current."""

    name: str
    using: Callable[[], AbstractContextManager[Any]]


def prepare(part: Part, rendering: Rendering, spec: EvaluateSpec, backbone: Backbone, report: Report) -> Held:
    """Choose the metric, read the retention text and the probes."""
    text = None
    if spec.retention:
        text = load_text(spec.retention, backbone.tokenizer, limit=spec.retention_passages)
    asked = prepare_behaviour(spec, part, rendering, backbone, report)
    metric, reason = spec.metric, "asked for"
    if metric == "auto":
        chosen, reason = choose([reference(row) for row in part.rows], [row.columns for row in part.rows])
        report(Note(f"score: {chosen} ({reason})"))
        return Held(part, rendering, text, chosen, reason, asked)
    return Held(part, rendering, text, metric, reason, asked)


def measure(
    contestant: Contestant,
    held: Held,
    spec: EvaluateSpec,
    backbone: Backbone,
    *,
    likelihood: bool = True,
    prompts: Sequence[list[int]] | None = None,
    asked: Asked | None = None,
    report: Report = silent,
) -> Measured:
    """Measure one contestant; `prompts` replaces the plain prompts of the generated rows, [] generates nothing.

    `asked` are the probes that it answers too.
    """
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
        answers = _answers(model, prompts, spec, backbone, report)
        behaviour = _behaviour(model, asked, spec, backbone, report) if asked else None
    rows = held.rows[: len(answers)]
    metric = METRICS[held.metric]
    scores = [metric(answer.text, reference(row), row.columns) for answer, row in zip(answers, rows, strict=True)]
    return Measured(contestant.name, nll, retention, answers, scores, behaviour)


def _behaviour(model: Any, asked: Asked, spec: EvaluateSpec, backbone: Backbone, report: Report) -> Behaved:
    report(Phase("probe behaviour"))
    return behave(model, asked, backbone.tokenizer, backbone.device, ANSWERS_PER_ROW * spec.batch_size)


def _answers(
    model: Any, prompts: Sequence[list[int]], spec: EvaluateSpec, backbone: Backbone, report: Report
) -> list[Completion]:
    """An answer to every prompt; one that the base has no positions for counts as unanswered, and is told."""
    positions = positions_of(backbone.model)
    fitting = [i for i, prompt in enumerate(prompts) if positions is None or len(prompt) < positions]
    if len(fitting) < len(prompts):
        count = f"{len(prompts) - len(fitting)} of {len(prompts)}"
        fact = f"{count} prompts have as many tokens as the base has positions ({positions}): they count as unanswered"
        report(Warned(fact, "shorten these rows, or leave them out"))
    done = generate(
        model,
        [prompts[i] for i in fitting],
        backbone.tokenizer,
        device=backbone.device,
        max_new_tokens=spec.max_new_tokens,
        batch_size=ANSWERS_PER_ROW * spec.batch_size,
        progress=lambda done: report(Progress(done, {})),
    )
    answers = [Completion("", [], stopped=False, finish="failed") for _ in prompts]
    for i, answer in zip(fitting, done, strict=True):
        answers[i] = answer
    return answers


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
    prompted_sets = _that_fit(_prompted(rows, train_rows, held.rendering, spec, backbone), backbone, report)
    plain: list[list[int]] | None = [] if prompted_sets else None
    asked = with_recall(held.asked, train_rows, held.rendering, backbone) if held.asked else None
    before = before or measure(base, held, spec, backbone, prompts=plain, asked=asked, report=report)
    if prompted is None:
        prompted = tuple(
            measure(
                Contestant(name, base.using), held, spec, backbone, likelihood=False, prompts=prompts, report=report
            )
            for name, prompts in prompted_sets
        )
    after = measure(adapter, held, spec, backbone, asked=asked, report=report)
    return Comparison(held, before, after, prompted, spec)


def _prompted(
    rows: Sequence[Row], train_rows: Sequence[Row], rendering: Rendering, spec: EvaluateSpec, backbone: Backbone
) -> list[tuple[str, list[list[int]]]]:
    """Prompts that give an untrained base its best chance: instructions, and instructions with solved examples."""
    if not rows:
        return []
    text = read_instructions(spec.instructions)
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


def _that_fit(
    sets: list[tuple[str, list[list[int]]]], backbone: Backbone, report: Report
) -> list[tuple[str, list[list[int]]]]:
    """The sets whose prompts leave the base room for an answer; the others are named and left out."""
    positions = positions_of(backbone.model)
    fitting = []
    for name, prompts in sets:
        longest = max(len(prompt) for prompt in prompts)
        if positions is None or longest < positions:
            fitting.append((name, prompts))
            continue
        fact = f"{name} is not measured: its prompts have up to {longest} tokens"
        hint = "lower evaluate.shots, or shorten evaluate.instructions"
        report(Warned(f"{fact}, and the base has {positions} positions", hint))
    return fitting


__all__ = ["COLUMNS", "Comparison", "Contestant", "Held", "Measured", "compare", "measure", "prepare", "reference"]
