"""A head's outputs → one prediction for every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.encode_spans import NULL
from peftkit.data.tasks.encode_words import LOST
from peftkit.data.tasks.spans import Found, best_span
from peftkit.data.tasks.task import Prediction, TaskExample, TaskName, TaskRow
from peftkit.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]


def decode(
    head: Head,
    rows: Sequence[TaskRow],
    examples: Sequence[TaskExample],
    outputs: Sequence[Array],
    *,
    task: TaskName,
    threshold: float = 0.5,
    max_answer_tokens: int = 30,
    null_bias: float = 0.0,
) -> list[Prediction]:
    """Read the outputs of every example into predictions, in the order of `rows`; all arithmetic is in float64.

    `outputs[i]` belongs to `examples[i]` and holds [labels] scores of a sequence or image head, [tokens, labels] of a
    token head, [tokens, 2] of a span head (start, end). Scores are logits; a regression's is the number.

    | head | value | confidence |
    |---|---|---|
    | single_label | the label with the highest softmax | its probability |
    | multi_label | labels whose sigmoid is at least `threshold` | product over all labels, taken as independent |
    | token | a tag per word, read where its loss counted | product over the words, taken as independent |
    | span | text of the best span of at most `max_answer_tokens`, "" for none | softmax of start × of end, its window |

    A span is chosen over no answer when its score is above the lowest no-answer score of all windows plus `null_bias`
    (Devlin et al. 2019, §4.3); -inf always answers. A row without an example has the value None; a word that no example
    reads (cut off, or without a token) is "O", or "" for tags that have no "O".

    Raises DataError for outputs that are not finite or not of these shapes, and for tasks that write text.
    """
    if head.kind == "seq2seq":
        raise DataError(f"{task} is generated: there are no scores to decode", expected="a head with labels or spans")
    if len(examples) != len(outputs):
        raise DataError(f"{len(outputs):,} outputs for {len(examples):,} sequences", expected="one each")
    scores = [_checked(head, example, np.asarray(output)) for example, output in zip(examples, outputs, strict=True)]
    by_row: dict[int, list[int]] = {}
    for at, example in enumerate(examples):
        by_row.setdefault(example.row, []).append(at)
    predictions = []
    for index, row in enumerate(rows):
        places = by_row.get(index, [])
        given = [(examples[at], scores[at]) for at in places]
        if head.kind == "token":
            predictions.append(_tags(head, row, given))
        elif not given:
            predictions.append(Prediction(None))
        elif head.kind == "span":
            predictions.append(_span(row, given, max_answer_tokens, null_bias))
        else:
            predictions.append(_scored(head, given[0][1], threshold))
    return predictions


def _checked(head: Head, example: TaskExample, output: Array) -> Array:
    tokens = len(example.input_ids)
    labels = len(head.labels)
    wanted = {"token": (tokens, labels), "span": (tokens, 2)}.get(head.kind, (labels,))
    if output.shape != wanted:
        fact = f"{example.where}: the outputs have the shape {output.shape}"
        raise DataError(fact, expected=f"{wanted} for a {head.kind} head")
    scores: Array = output.astype(np.float64)
    if not np.isfinite(scores).all():
        raise DataError(
            f"{example.where}: the outputs hold {np.count_nonzero(~np.isfinite(scores))} values that are not finite",
            expected="finite scores",
            hint="the model computes nan or inf: look at the training loss, or load the base in float32",
        )
    return scores


def log_softmax(scores: Array) -> Array:
    """Logarithms of the softmax over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _sigmoid(scores: Array) -> Array:
    small: Array = np.exp(-np.abs(scores))  # at most 1: no overflow on either side
    return np.where(scores >= 0, 1.0, small) / (1.0 + small)


def _scored(head: Head, scores: Array, threshold: float) -> Prediction:
    if head.problem == "regression":
        return Prediction(float(scores[0]))
    if head.problem == "multi_label":
        shares = _sigmoid(scores)
        chosen = shares >= threshold
        value = tuple(label for label, taken in zip(head.labels, chosen, strict=True) if taken)
        return Prediction(value, float(np.where(chosen, shares, 1 - shares).prod()), tuple(shares.tolist()))
    shares = np.exp(log_softmax(scores))
    best = int(scores.argmax())
    return Prediction(head.labels[best], float(shares[best]), tuple(shares.tolist()))


def _tags(head: Head, row: TaskRow, given: Sequence[tuple[TaskExample, Array]]) -> Prediction:
    if not given:
        return Prediction(None)
    tags = ["O" if "O" in head.labels else ""] * len(row.words)
    sure = 0.0
    for example, scores in given:
        logs = log_softmax(scores)
        for word, position in enumerate(example.words, start=example.first_word):
            if position != LOST:
                best = int(scores[position].argmax())
                tags[word] = head.labels[best]
                sure += float(logs[position, best])
    return Prediction(tuple(tags), float(np.exp(sure)))


def _span(
    row: TaskRow, given: Sequence[tuple[TaskExample, Array]], max_answer_tokens: int, null_bias: float
) -> Prediction:
    best: tuple[Found, TaskExample, Array] | None = None
    for example, scores in given:
        found = best_span(scores, example.offsets, max_answer_tokens)
        if found is not None and (best is None or found.score > best[0].score):
            best = found, example, scores
    nulls = [float(scores[NULL].sum()) for _, scores in given]
    lowest = nulls.index(min(nulls))
    if best is None or not best[0].score > nulls[lowest] + null_bias:
        logs = log_softmax(given[lowest][1].T)
        return Prediction("", float(np.exp(logs[:, NULL].sum())))
    found, example, scores = best
    logs = log_softmax(scores.T)
    sure = float(np.exp(logs[0, found.first] + logs[1, found.last]))
    return Prediction(row.text[example.offsets[found.first][0] : example.offsets[found.last][1]], sure)
