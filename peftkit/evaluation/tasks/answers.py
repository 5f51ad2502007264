"""Answers taken from a passage, scored as SQuAD's `evaluate-v2.0.py` does (Rajpurkar et al. 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.evaluation.tasks.metric import Measures, Metric, Numbers, divide, from_sums, mean_of

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower case, without punctuation (ASCII's), the articles a, an, the, and extra spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(wanted: str, given: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(normalise(wanted) == normalise(given))


def overlap(wanted: str, given: str) -> float:
    """F1 of the two bags of words; where either has none, 1 if both have none, else 0."""
    a, b = normalise(wanted).split(), normalise(given).split()
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))


def extractive(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """Exact match and F1, the best over a row's reference answers; of questions with and without an answer apart."""
    exact, f1 = np.zeros(len(rows)), np.zeros(len(rows))
    for i, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        # As in the official script: a reference that normalises to nothing is none, and no reference is the empty one.
        references = [answer.text for answer in row.target if normalise(answer.text)] or [""]
        exact[i] = max(exact_match(reference, prediction.value) for reference in references)
        f1[i] = max(overlap(reference, prediction.value) for reference in references)
    answered = np.array([bool(row.target) for row in rows])
    metrics = [
        Metric("f1", float(f1.mean()), mean_of(f1), mean_of_shares=True),
        Metric("exact_match", float(exact.mean()), mean_of(exact), mean_of_shares=True),
    ]
    if not answered.all():
        metrics += [
            _of("has_answer_f1", f1, answered),
            _of("has_answer_exact_match", exact, answered),
            _of("no_answer_accuracy", exact, ~answered),
        ]
    return Measures(tuple(metrics), "f1", f1, {}, {})


def _of(name: str, scores: Numbers, members: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Metric:
    """The mean over some of the rows."""
    columns = np.column_stack([scores * members, members.astype(np.float64)])
    values = from_sums(columns, lambda s: divide(s[:, 0], s[:, 1]))
    return Metric(name, float(scores[members].mean()) if members.any() else float("nan"), values)
