"""How much of the held-out rows is measured, whatever a recipe measures: what plan and probe count with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec


@dataclass(frozen=True)
class Measuring:
    """Passes over the held-out rows at the end of a run, and answers to them."""

    passes: int
    """How often all rows are read: by the base and by the adapter, by a task's head once."""
    answers: int = 0
    """Answers generated in all: by the adapter, by the base, and by the base once more with a better prompt."""
    max_new_tokens: int = 0
    """Longest answer; 0 where none is generated, because answers are compared or a head gives labels."""
    asked_rows: int = 0
    """Rows at once that a base is asked in words, loaded once more beside the one that has a task's head."""


def measuring(evaluate: Any, rows: int, *, has_head: bool) -> Measuring:
    """What a recipe's settings of evaluation ask for on so many held-out rows; `has_head`: a task's head is trained."""
    if isinstance(evaluate, PreferenceEvaluateSpec):
        return Measuring(2)
    better_prompt = bool(evaluate.instructions) + bool(evaluate.shots)
    if isinstance(evaluate, TaskEvaluateSpec) and has_head:
        return Measuring(1, asked_rows=min(evaluate.batch_size, evaluate.max_prompted_rows) if evaluate.shots else 0)
    if isinstance(evaluate, TaskEvaluateSpec):  # one prompt has both
        others = (1 + min(1, better_prompt)) * min(rows, evaluate.max_prompted_rows)
        return Measuring(2, rows + others, evaluate.max_new_tokens)
    assert isinstance(evaluate, EvaluateSpec)
    answered = min(evaluate.max_generated_rows, rows)
    return Measuring(2, (2 + better_prompt) * answered, evaluate.max_new_tokens if evaluate.max_generated_rows else 0)
