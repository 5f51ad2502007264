"""Tags given against tags wanted: spans of entities where the tags are B- and I-, and single tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.evaluation.tasks.metric import (
    Measures,
    Metric,
    Numbers,
    divide,
    f1,
    from_sums,
    mean_defined,
    table,
)
from peftkit.extras import extra

_IOB2 = re.compile(r"O|[BI]-.+")


def marks_spans(head: Head) -> bool:
    """Whether the tags are IOB2: O, and B-… and I-… of span types."""
    return all(_IOB2.fullmatch(label) for label in head.labels) and any(label != "O" for label in head.labels)


def tokens(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """Span precision, recall and F1 (seqeval, strict IOB2: an I- without its B- begins no span) and token accuracy.

    Tags that mark no spans (parts of speech) have token accuracy, which ranks them, and macro-F1 over tags.
    """
    wanted = [list(row.target) for row in rows]
    given = [list(prediction.value) for prediction in predictions]
    right = np.array([sum(map(str.__eq__, a, b)) for a, b in zip(wanted, given, strict=True)], dtype=np.float64)
    words = np.array([len(tags) for tags in wanted], dtype=np.float64)
    accuracy = Metric(
        "token_accuracy",
        float(divide(right.sum(), words.sum())),
        from_sums(np.column_stack([right, words]), lambda s: divide(s[:, 0], s[:, 1])),
    )
    share = divide(right, words)
    if marks_spans(head):
        metrics, labels = _spans(wanted, given)
        return Measures((*metrics, accuracy), "span_f1", share, labels, {})
    macro, labels = _tags(head, wanted, given)
    return Measures((accuracy, macro), "token_accuracy", share, labels, {})


def _spans(wanted: list[list[str]], given: list[list[str]]) -> tuple[list[Metric], dict[str, dict[str, float | None]]]:
    with extra("tasks", "measuring entity spans"):
        from seqeval.metrics import f1_score, precision_score, recall_score
        from seqeval.scheme import IOB2, Entities
    found, true = Entities(given, IOB2).entities, Entities(wanted, IOB2).entities
    types = tuple(sorted({span.tag for span in chain(*found, *true)}))
    hits = _counts([set(a) & set(b) for a, b in zip(found, true, strict=True)], types)
    gave, had = _counts(found, types), _counts(true, types)
    totals = np.column_stack([part.sum(axis=1) for part in (hits, gave, had)])
    settings: dict[str, Any] = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    defined = {"span_precision": gave.sum() > 0, "span_recall": had.sum() > 0, "span_f1": gave.sum() + had.sum() > 0}
    library = {"span_f1": f1_score, "span_precision": precision_score, "span_recall": recall_score}
    values = {
        "span_f1": lambda s: f1(s[:, 0], s[:, 1], s[:, 2]),
        "span_precision": lambda s: divide(s[:, 0], s[:, 1]),
        "span_recall": lambda s: divide(s[:, 0], s[:, 2]),
    }
    metrics = [
        Metric(
            name,
            float(score(wanted, given, **settings)) if defined[name] else float("nan"),
            from_sums(totals, values[name]),
        )
        for name, score in library.items()
    ]
    return metrics, table(types, hits.sum(axis=0), gave.sum(axis=0), had.sum(axis=0))


def _tags(
    head: Head, wanted: list[list[str]], given: list[list[str]]
) -> tuple[Metric, dict[str, dict[str, float | None]]]:
    with extra("tasks", "measuring tags"):
        from sklearn.metrics import f1_score
    index = {label: i for i, label in enumerate(head.labels)}
    hits, gave, had = (np.zeros((len(wanted), len(index))) for _ in range(3))
    for row, (a, b) in enumerate(zip(wanted, given, strict=True)):
        for true, found in zip(a, b, strict=True):
            had[row, index[true]] += 1
            hits[row, index[true]] += true == found
            if found in index:
                gave[row, index[found]] += 1
    count = len(index)
    values = from_sums(
        np.hstack([hits, gave, had]),
        lambda s: mean_defined(f1(s[:, :count], s[:, count : 2 * count], s[:, 2 * count :])),
    )
    flat = [list(chain.from_iterable(tags)) for tags in (wanted, given)]
    point = f1_score(*flat, labels=list(head.labels), average="macro", zero_division=np.nan)
    return Metric("macro_f1", float(point), values), table(head.labels, hits.sum(0), gave.sum(0), had.sum(0))


def _counts(spans: Sequence[Sequence[Any] | set[Any]], types: tuple[str, ...]) -> Numbers:
    """How many spans of each type a row has (rows × types)."""
    counts = np.zeros((len(spans), len(types)))
    index = {name: i for i, name in enumerate(types)}
    for row, members in enumerate(spans):
        for span in members:
            counts[row, index[span.tag]] += 1
    return counts
