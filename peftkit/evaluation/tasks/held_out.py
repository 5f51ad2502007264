"""A task's adapter on the held-out rows, beside what needs no training: baselines, and the base asked in words."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.base.head import NO_ANSWER, Head
from peftkit.data.chat_prompt import chat_prompt
from peftkit.data.tasks.decode import decode
from peftkit.data.tasks.task import Prediction, TaskExample, TaskName, TaskPart, TaskRow
from peftkit.data.template import Rendering
from peftkit.evaluation.preflight import read_instructions
from peftkit.evaluation.tasks.baselines import baselines
from peftkit.evaluation.tasks.comparison import ADAPTER, TaskComparison, measured_rows
from peftkit.evaluation.tasks.prompted import messages, parse
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Phase, Progress, Report, Warned, silent
from peftkit.generation.forward import autocast
from peftkit.generation.generate import generate
from peftkit.generation.limits import positions_of
from peftkit.generation.tasks import Pixels, outputs, texts


def predict(
    model: Any,
    backbone: Backbone,
    task: TaskName,
    rows: Sequence[TaskRow],
    examples: Sequence[TaskExample],
    spec: TaskEvaluateSpec,
    *,
    pixels: Pixels | None = None,
    report: Report = silent,
) -> list[Prediction]:
    """What a model says of every row; `examples` are its sequences, and their `row` counts in `rows`."""
    head = backbone.head
    assert head is not None  # a task's backbone is loaded with its head
    report(Phase("predict", len(examples), "sequences"))
    options: dict[str, Any] = {
        "batch_size": spec.batch_size,
        "progress": lambda done: report(Progress(done, {})),
    }
    if head.kind == "seq2seq":
        written = texts(model, backbone, examples, max_new_tokens=spec.max_new_tokens, **options)
        by_row = {example.row: text for example, text in zip(examples, written, strict=True)}
        return [Prediction(by_row.get(index)) for index in range(len(rows))]
    scores = outputs(model, backbone, examples, pixels=pixels, **options)
    return decode(
        head,
        rows,
        examples,
        scores,
        task=task,
        threshold=spec.threshold,
        max_answer_tokens=spec.max_answer_tokens,
        # What never learned that a question may have no answer gives one.
        null_bias=0.0 if NO_ANSWER in head.labels else -math.inf,
    )


def compare_task(
    model: Any,
    backbone: Backbone,
    task: TaskName,
    train_rows: Sequence[TaskRow],
    held: TaskPart,
    spec: TaskEvaluateSpec,
    *,
    language: Callable[[], Backbone] | None = None,
    pixels: Pixels | None = None,
    report: Report = silent,
) -> TaskComparison:
    """The adapter's predictions for the held-out rows, those of the baselines, and of the base asked in words.

    `language` loads the same base with its language head, for evaluate.shots.
    """
    head, rows = backbone.head, measured_rows(held)
    assert head is not None
    contestants: dict[str, list[Prediction]] = {}
    if spec.baselines:
        report(Phase("baselines"))
        contestants |= baselines(task, head, train_rows, rows, seed=spec.seed)
    if spec.shots:
        contestants |= _prompted(task, head, train_rows, rows, spec, language, report)
    given = predict(model, backbone, task, held.rows, held.examples, spec, pixels=pixels, report=report)
    measured = sorted({example.row for example in held.examples})
    contestants[ADAPTER] = [given[index] for index in measured]
    return TaskComparison(task, head, held, contestants, spec)


def _prompted(
    task: TaskName,
    head: Head,
    train_rows: Sequence[TaskRow],
    rows: Sequence[TaskRow],
    spec: TaskEvaluateSpec,
    language: Callable[[], Backbone] | None,
    report: Report,
) -> dict[str, list[Prediction]]:
    """The base with its own language head, shown solved rows and asked for the answer in words."""
    if language is None or task == "image_classification":
        report(Warned("evaluate.shots: this base cannot be asked in words", "leave evaluate.shots out"))
        return {}
    backbone, rendering = language(), Rendering()
    instruction = read_instructions(spec.instructions)
    drawn = random.Random(spec.seed).sample(range(len(train_rows)), min(spec.shots, len(train_rows)))
    shots, asked = [train_rows[index] for index in drawn], rows[: spec.max_prompted_rows]
    tokenizer = backbone.tokenizer
    prompts = [chat_prompt(messages(task, head, row, shots, instruction), tokenizer, rendering) for row in asked]
    positions = positions_of(backbone.model)
    longest = max(map(len, prompts))
    if positions is not None and longest >= positions:
        fact = f"the prompts with {spec.shots} examples have up to {longest} tokens, and the base {positions} positions"
        report(Warned(f"{fact}: the prompted base is not measured", "lower evaluate.shots"))
        return {}
    report(Phase("ask the base in words", len(prompts), "answers"))
    with autocast(backbone.device, backbone.placement.compute_dtype):
        answers = generate(
            backbone.model,
            prompts,
            tokenizer,
            device=backbone.device,
            max_new_tokens=spec.max_new_tokens,
            batch_size=spec.batch_size,
            progress=lambda done: report(Progress(done, {})),
        )
    named = sum(answer.stopped for answer in answers)
    report(
        Note(
            f"the base, asked in words with {len(shots)} solved rows, ends {named} of {len(answers)} answers by itself"
        )
    )
    found = [parse(task, head, row, answer.text) for row, answer in zip(asked, answers, strict=True)]
    return {f"base + {len(shots)} examples": found}
