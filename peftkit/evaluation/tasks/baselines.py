"""What a task's adapter must beat: predictions that need no network, learned from the training rows in seconds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskName, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.tasks.learned import linear_on_pixels, linear_on_words

LEARNED: tuple[TaskName, ...] = ("text_classification", "regression", "token_classification", "image_classification")
"""Tasks whose baselines learn from training rows; those of the others need none."""
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"\w+")


def baselines(
    task: TaskName,
    head: Head,
    train_rows: Sequence[TaskRow],
    rows: Sequence[TaskRow],
    *,
    seed: int = 0,
) -> dict[str, list[Prediction]]:
    """Each baseline's predictions for `rows`, by its name; none of them looks at the targets of `rows`.

    With probabilities where it has any; `seed` is that of scikit-learn's solvers.
    Raises DataError where the baseline learns and there are no training rows.
    """
    if task in LEARNED and not train_rows:
        raise DataError("the baselines have no training rows to learn from", expected="at least one row")
    if task == "regression":
        return {"mean": _mean(train_rows, rows), **linear_on_words(head, train_rows, rows, seed)}
    if task == "text_classification":
        return {"majority": majority(head, train_rows, rows), **linear_on_words(head, train_rows, rows, seed)}
    if task == "image_classification":
        return {"majority": majority(head, train_rows, rows), **linear_on_pixels(head, train_rows, rows, seed)}
    if task == "token_classification":
        return {"most frequent tag": most_frequent_tags(train_rows, rows)}
    if task == "extractive_qa":
        return {
            "longest sentence": [Prediction(_longest(row)) for row in rows],
            "sentence most like the question": [Prediction(_most_like(row)) for row in rows],
            "no answer": [Prediction("") for _ in rows],
        }
    if task == "translation":
        return {"source": [Prediction(row.text) for row in rows]}
    return {f"lead-{count}": [Prediction(_lead(row.text, count)) for row in rows] for count in (3, 1)}


def majority(head: Head, train_rows: Sequence[TaskRow], rows: Sequence[TaskRow]) -> list[Prediction]:
    """The most frequent label (of equals the first of the head), with the labels' shares as probabilities.

    Of several labels: those that more than half of the training rows have.
    """
    several = head.problem == "multi_label"
    counts = Counter(label for row in train_rows for label in (row.target if several else (row.target,)))
    shares = tuple(counts[label] / len(train_rows) for label in head.labels)
    if several:
        value: Any = tuple(label for label, share in zip(head.labels, shares, strict=True) if share > 0.5)
        return [Prediction(value, None, shares) for _ in rows]
    best = max(range(len(shares)), key=lambda i: shares[i])
    return [Prediction(head.labels[best], shares[best], shares) for _ in rows]


def _mean(train_rows: Sequence[TaskRow], rows: Sequence[TaskRow]) -> list[Prediction]:
    mean = sum(row.target for row in train_rows) / len(train_rows)
    return [Prediction(mean) for _ in rows]


def most_frequent_tags(train_rows: Sequence[TaskRow], rows: Sequence[TaskRow]) -> list[Prediction]:
    """The tag that each word most often has in the training rows; an unknown word has O, or the most frequent of all.

    An I- that no tag of its type stands before becomes a B-: as a strict reading of IOB2 has it, it would count for
    nothing.
    """
    counts: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for row in train_rows:
        overall.update(row.target)
        for word, tag in zip(row.words, row.target, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    unknown = "O" if "O" in overall else overall.most_common(1)[0][0]
    best = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    return [Prediction(_opened([best.get(word, unknown) for word in row.words], overall)) for row in rows]


def _opened(tags: list[str], known: Counter[str]) -> tuple[str, ...]:
    """Tags with every span opened by its B-, where the training rows have that tag."""
    opened = []
    for before, tag in pairwise(["O", *tags]):
        opening = "B-" + tag[2:]
        broken = tag.startswith("I-") and before not in (tag, opening) and opening in known
        opened.append(opening if broken else tag)
    return tuple(opened)


def sentences(text: str) -> list[str]:
    """The sentences of a text, by the marks that end one (an abbreviation's point too); without any it is one."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def _lead(text: str, count: int) -> str:
    return " ".join(sentences(text)[:count])


def _longest(row: TaskRow) -> str:
    return max(sentences(row.text), key=len, default="")


def _most_like(row: TaskRow) -> str:
    """The first of the sentences that share the most distinct words with the question."""
    asked = set(_WORD.findall((row.pair or "").lower()))
    return max(sentences(row.text), key=lambda found: len(asked & set(_WORD.findall(found.lower()))), default="")
