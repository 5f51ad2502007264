"""Texts that base and adapter write: translations and summaries scored as sets, with likelihood where a base chats.

They are scored at corpus level by `evaluation.tasks`; how likely the wanted texts are, and what was forgotten, is
measured as after supervised fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from peftkit.backbone.load import Backbone
from peftkit.data.chat import prompt_for
from peftkit.data.tasks.asked import AskedRows, conversation
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.evaluation.comparison import Comparison, Held, Measured
from peftkit.evaluation.held_out import Contestant, measure
from peftkit.evaluation.preflight import read_instructions
from peftkit.evaluation.retention import load_text
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.evaluation.tasks.baselines import baselines
from peftkit.evaluation.tasks.comparison import ADAPTER, TaskComparison, measured, measured_rows
from peftkit.evaluation.tasks.held_out import predict
from peftkit.evaluation.tasks.slices import Slices
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Phase, Report, Warned, silent
from peftkit.generation.limits import positions_of

BASE = "base"


@dataclass(frozen=True)
class AnsweredComparison:
    """Two views of the same answers."""

    scored: TaskComparison
    """What was written, beside baselines."""
    likelihood: Comparison
    """How likely base and adapter find the wanted texts, and general text; its rows have no scores."""
    instruction: str

    @property
    def slices(self) -> list[Slices]:
        """The adapter's score by each column that was asked for."""
        return self.scored.slices

    @property
    def stopped(self) -> tuple[int, int]:
        """How many of the adapter's answers ended by themselves, of how many."""
        answers = self.likelihood.adapter.answers
        return sum(answer.stopped for answer in answers), len(answers)

    def figures(self) -> dict[str, dict[str, Any]]:
        """Numbers for the manifest: the best rival before, the adapter after, with likelihood; no row, no text of one.

        `answer_nll` and `retention_nll` before are the base's, whichever rival scored best.
        """
        likelihood, scored = self.likelihood.figures(), self.scored.figures()
        found = {side: {**likelihood[side], **scored[side]} for side in ("before", "after", "other")}
        ended, count = self.stopped
        found["after"]["stopped"] = ended / count
        found["other"]["instruction"] = self.instruction
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Answers side by side, for the run folder only."""
        return self.scored.samples()

    def objective(self) -> tuple[str, float | None, Literal["max", "min"]]:
        """What a search over settings goes by: the metric that ranks."""
        return self.scored.objective()


def compare_answered(
    base: Contestant,
    adapter: Contestant,
    data: AskedRows,
    spec: TaskEvaluateSpec,
    backbone: Backbone,
    *,
    train_rows: Sequence[TaskRow] = (),
    first: AnsweredComparison | None = None,
    report: Report = silent,
) -> AnsweredComparison:
    """Let base and adapter write every text greedily, and measure how likely they find the wanted ones.

    The base writes the first `max_prompted_rows`: asked as in training, and with instructions or solved `train_rows`
    where the settings have any. What `first` has of base and baselines on the same rows is taken from there.
    """
    text = first.likelihood.held.text if first is not None else load_text("general", backbone.tokenizer)
    held = Held(data.asked, data.rendering, text, "exact_match", "not shown")
    settings = EvaluateSpec(batch_size=spec.batch_size, max_new_tokens=spec.max_new_tokens)
    prompts = [prompt_for(row, backbone.tokenizer, held.rendering) for row in held.rows]
    if first is not None:
        rivals, before = dict(first.scored.contestants), first.likelihood.base
        del rivals[ADAPTER]
    else:
        rivals, before = _rivals(base, data, train_rows, prompts, held, settings, spec, backbone, report)
    after = measure(adapter, held, settings, backbone, prompts=prompts, report=report)
    likelihood = Comparison(held, replace(before, scores=[]), replace(after, scores=[]), (), settings)
    scored = TaskComparison(data.task, data.head, data.held, {**rivals, ADAPTER: _written(after)}, spec)
    return AnsweredComparison(scored, likelihood, data.instruction)


def _rivals(
    base: Contestant,
    data: AskedRows,
    train_rows: Sequence[TaskRow],
    prompts: Sequence[list[int]],
    held: Held,
    settings: EvaluateSpec,
    spec: TaskEvaluateSpec,
    backbone: Backbone,
    report: Report,
) -> tuple[dict[str, list[Prediction]], Measured]:
    """What the adapter is compared with: baselines, the base, the base with a better prompt; and the base's figures."""
    found: dict[str, list[Prediction]] = {}
    if spec.baselines:
        report(Phase("baselines"))
        found |= baselines(data.task, data.head, train_rows, measured_rows(data.held), seed=spec.seed)
    options: dict[str, Any] = {"report": report}
    before = measure(base, held, settings, backbone, prompts=prompts[: spec.max_prompted_rows], **options)
    found[BASE] = _written(before)
    for name, shown in _prompted(data, train_rows, spec, backbone, report):
        again = measure(replace(base, name=name), held, settings, backbone, prompts=shown, likelihood=False, **options)
        found[name] = _written(again)
    return found, before


def decoded(
    comparison: TaskComparison, base: Contestant, backbone: Backbone, *, report: Report = silent
) -> list[Prediction]:
    """What an encoder-decoder base decodes by itself for the first `max_prompted_rows` of a comparison."""
    spec, held = comparison.spec, comparison.held
    examples = held.examples[: spec.max_prompted_rows]
    with base.using() as model:
        given = predict(model, backbone, comparison.task, held.rows, examples, spec, report=report)
    return [given[example.row] for example in examples]


def beside_base(comparison: TaskComparison, given: list[Prediction]) -> TaskComparison:
    """The comparison with what `decoded` gave beside its other rivals."""
    contestants = dict(comparison.contestants)
    own = contestants.pop(ADAPTER)
    return replace(comparison, contestants={**contestants, BASE: given, ADAPTER: own})


def _written(found: Measured) -> list[Prediction]:
    return [Prediction(answer.text.strip()) for answer in found.answers]


def _prompted(
    data: AskedRows, train_rows: Sequence[TaskRow], spec: TaskEvaluateSpec, backbone: Backbone, report: Report
) -> list[tuple[str, list[list[int]]]]:
    """Prompts that give the base a better chance, under the name they are shown by; none where they are too long."""
    given = read_instructions(spec.instructions)
    if given is None and not spec.shots:
        return []
    instruction = given or data.instruction
    rows: Sequence[TaskRow] = measured(data.held, data.held.rows)[: spec.max_prompted_rows]
    shots = [conversation(row, instruction) for row in train_rows[: spec.shots]]
    asked = [conversation(row, instruction) for row in rows]
    prompts = [prompt_for(row, backbone.tokenizer, data.rendering, shots=shots) for row in asked]
    name = f"{BASE} + {len(shots)} examples" if shots else f"{BASE} + instructions"
    longest, positions = max(map(len, prompts)), positions_of(backbone.model)
    if positions is not None and longest >= positions:
        fact = (
            f"{name} is not measured: its prompts have up to {longest} tokens, and the base has {positions} positions"
        )
        report(Warned(fact, "lower evaluate.shots, or shorten evaluate.instructions"))
        return []
    return [(name, prompts)]
