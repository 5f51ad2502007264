"""How much of the held-out rows is measured, whatever a recipe measures: what plan and probe count with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec


@dataclass(frozen=True)
class Measuring:
    """Passes over the held-out rows, and answers to them."""

    passes: int
    """How often all rows are read: by the base and by the adapter, by a task's head once."""
    answered: int
    """Held-out rows that an answer is generated for; 0 where answers are only compared, or a head gives labels."""
    contestants: int
    """How many answer those rows: base and adapter, and the base once more for each better prompt."""
    max_new_tokens: int
    """Longest answer; 0 where none is generated."""
    asks_base: bool = False
    """The base is loaded once more, with its language head, and asked in words."""


def measuring(evaluate: Any, rows: int, *, has_head: bool) -> Measuring:
    """What a recipe's settings of evaluation ask for on so many held-out rows; `has_head`: a task's head is trained."""
    if isinstance(evaluate, PreferenceEvaluateSpec):
        return Measuring(2, 0, 0, 0)
    if isinstance(evaluate, TaskEvaluateSpec) and has_head:
        asks = evaluate.shots > 0
        return Measuring(1, 0, 0, evaluate.max_new_tokens if asks else 0, asks_base=asks)
    if isinstance(evaluate, TaskEvaluateSpec):
        return Measuring(2, rows, 2 + bool(evaluate.instructions or evaluate.shots), evaluate.max_new_tokens)
    assert isinstance(evaluate, EvaluateSpec)
    if not evaluate.max_generated_rows:
        return Measuring(2, 0, 0, 0)
    contestants = 2 + bool(evaluate.instructions) + bool(evaluate.shots)
    return Measuring(2, min(evaluate.max_generated_rows, rows), contestants, evaluate.max_new_tokens)
