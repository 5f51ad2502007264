"""Which of a head's scores is explained: the predicted label's, the asked one's, a word's tag, an answer's ends."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftkit.base.head import Head
from peftkit.data.tasks.encode_spans import NULL
from peftkit.data.tasks.encode_words import LOST
from peftkit.data.tasks.spans import best_span
from peftkit.data.tasks.task import TaskExample, TaskRow
from peftkit.errors import BackboneError, ConfigError
from peftkit.evaluation.explaining.spec import ExplainSpec

_WHERE = "what to explain"


@dataclass(frozen=True)
class Asked:
    """A score to explain: the sum of some of a head's outputs."""

    what: str
    """In words, such as "the logit of 'spam'"."""
    places: tuple[tuple[int, ...], ...]
    """Indices into the outputs of one sequence."""

    def of(self, outputs: Any) -> Any:
        """The score of every sequence; `outputs` is an array or tensor with a leading batch axis."""
        return sum(outputs[(slice(None), *place)] for place in self.places)


def check_asked(head: Head, row: TaskRow, spec: ExplainSpec) -> None:
    """Raise BackboneError for a head that cannot be explained, ConfigError for what does not fit the head or row."""
    if head.kind in ("image", "seq2seq"):
        what = "looks at pixels" if head.kind == "image" else "writes text, one score after another"
        raise BackboneError(
            f"a head of kind {head.kind} {what}: there is no score of words to explain",
            expected="an adapter that classifies, tags or numbers texts, or answers questions about them",
        )
    problems = [*_about_text(head, row), *_about_target(head, spec), *_about_word(head, row, spec)]
    if problems:
        raise ConfigError(problems, where=_WHERE)


def asked_of(
    head: Head, row: TaskRow, example: TaskExample, scores: NDArray[Any], spec: ExplainSpec, *, max_answer_tokens: int
) -> Asked:
    """The score that `spec` asks for, given the head's outputs of the sequence; `check_asked` has passed.

    Raises ConfigError for a word without a token of its own, and where a token head is asked without a word.
    """
    if head.kind == "span":
        return _ends(row, example, scores.astype(np.float64), max_answer_tokens)
    if head.kind == "token":
        return _tag(head, row, example, scores, spec)
    if head.problem == "regression":
        return Asked(f"the number {head.labels[0]!r}", ((0,),))
    index = head.labels.index(spec.target) if spec.target is not None else int(scores.argmax())
    return Asked(f"the logit of {head.labels[index]!r}", ((index,),))


def _about_text(head: Head, row: TaskRow) -> list[str]:
    found = []
    if not (row.text.strip() or any(word.strip() for word in row.words)):
        found.append("--text is empty: there are no words to explain by")
    if head.kind == "span" and not (row.pair or "").strip():
        found.append("--pair is missing: it is the question, and --text the context")
    if head.kind == "token" and row.pair is not None:
        found.append("--pair: this adapter tags the words of one text")
    return found


def _about_target(head: Head, spec: ExplainSpec) -> list[str]:
    if spec.target is None:
        return []
    if head.kind == "span" or head.problem == "regression":
        what = "answers with a span of the context" if head.kind == "span" else f"gives one number, {head.labels[0]!r}"
        return [f"--target {spec.target!r}: this adapter {what}; leave --target out"]
    if spec.target in head.labels:
        return []
    near = difflib.get_close_matches(spec.target, head.labels, n=1, cutoff=0.6)
    shown = ", ".join(head.labels[:12]) + (f" and {len(head.labels) - 12} more" if head.labels[12:] else "")
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return [f"--target {spec.target!r} is not a label of this adapter: {shown}{meant}"]


def _about_word(head: Head, row: TaskRow, spec: ExplainSpec) -> list[str]:
    if spec.word is None:
        return []
    if head.kind != "token":
        return [f"--word {spec.word}: this adapter tags no words; leave --word out"]
    count = len(row.words)
    return [f"--word {spec.word}: the text has {count} words"] if spec.word > count else []


def _tag(head: Head, row: TaskRow, example: TaskExample, scores: NDArray[Any], spec: ExplainSpec) -> Asked:
    if spec.word is None:
        raise ConfigError([f"--word is missing: {_tagged(head, row, example, scores)}"], where=_WHERE, hint="--word N")
    position = example.words[spec.word - 1 - example.first_word]
    word = row.words[spec.word - 1]
    if position == LOST:
        raise ConfigError([f"--word {spec.word}: the tokenizer makes no token of {word!a}"], where=_WHERE)
    label = head.labels.index(spec.target) if spec.target is not None else int(scores[position].argmax())
    return Asked(f"the logit of {head.labels[label]!r} for word {spec.word}, {word!r}", ((position, label),))


def _tagged(head: Head, row: TaskRow, example: TaskExample, scores: NDArray[Any]) -> str:
    """The words with their predicted tags: 1 Ada B-PER, 2 slept O, …"""
    tags = [
        f"{number} {word} {'-' if position == LOST else head.labels[int(scores[position].argmax())]}"
        for number, (word, position) in enumerate(zip(row.words, example.words, strict=True), start=1)
    ]
    return ", ".join(tags[:20]) + (f" and {len(tags) - 20} more" if tags[20:] else "")


def _ends(row: TaskRow, example: TaskExample, scores: NDArray[np.float64], max_answer_tokens: int) -> Asked:
    best = best_span(scores, example.offsets, max_answer_tokens)
    if best is None or not best.score > float(scores[NULL].sum()):  # as data.tasks.decode chooses
        return Asked("the start and end logits of no answer", ((NULL, 0), (NULL, 1)))
    answer = row.text[example.offsets[best.first][0] : example.offsets[best.last][1]]
    return Asked(f"the start and end logits of {answer!r}", ((best.first, 0), (best.last, 1)))
