"""Whether predictions can be compared with rows at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskName, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.tasks.spans import marks_spans

_SHOWN = 20


def check(task: TaskName, head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> None:
    """Raises DataError naming every row without a reference, or whose reference or prediction does not fit the head."""
    if not rows:
        raise DataError("there are no rows to measure", expected="at least one row")
    if len(rows) != len(predictions):
        raise DataError(f"{len(predictions)} predictions for {len(rows)} rows", expected="one prediction for each row")
    problems = []
    for row, prediction in zip(rows, predictions, strict=True):
        reason = _reference(task, head, row) or _prediction(task, head, row, prediction)
        if reason:
            problems.append(f"{row.where}: {reason}")
    if problems:
        shown = problems[:_SHOWN] + ([f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise DataError(
            f"{len(problems)} of {len(rows)} rows cannot be measured\n- " + "\n- ".join(shown),
            expected="a reference and a prediction that fit the task's labels",
            hint="give the rows their reference, or train on rows that have these labels too",
        )


def _reference(task: TaskName, head: Head, row: TaskRow) -> str | None:
    if row.target is None:
        return "no reference"
    if task == "regression":
        return None if math.isfinite(row.target) else f"the reference {row.target} is not finite"
    unknown = sorted({label for label in _labels(task, head, row.target) if label not in head.labels})
    if unknown:
        return f"the reference {', '.join(map(repr, unknown))} is no label of the head"
    if task == "token_classification" and len(row.target) != len(row.words):
        return f"{len(row.target)} tags for {len(row.words)} words"
    return None


def _prediction(task: TaskName, head: Head, row: TaskRow, prediction: Prediction) -> str | None:
    value, odds = prediction.value, prediction.probabilities
    if value is None and task != "regression":
        return "no prediction"
    if not all(map(math.isfinite, [*odds, prediction.confidence or 0.0])):
        return "a probability is not finite"
    if odds and len(odds) != len(head.labels):
        return f"{len(odds)} probabilities for {len(head.labels)} labels"
    if task == "regression":
        return (
            f"the prediction {value} is not finite" if isinstance(value, float) and not math.isfinite(value) else None
        )
    if task == "token_classification" and len(value) != len(row.target):
        return f"{len(value)} tags predicted for {len(row.target)} words"
    # A prompted base may name no label at all: "" is a wrong answer, not a broken one. Spans have O for that.
    allowed = {*head.labels} if marks_spans(head) or head.problem == "multi_label" else {"", *head.labels}
    unknown = sorted({label for label in _labels(task, head, value) if label not in allowed})
    return f"the prediction {', '.join(map(repr, unknown))} is no label of the head" if unknown else None


def _labels(task: TaskName, head: Head, value: Any) -> tuple[str, ...]:
    """The labels that a reference or a prediction names."""
    if task == "token_classification" or head.problem == "multi_label":
        return tuple(value)
    return (value,) if task in ("text_classification", "image_classification") else ()
