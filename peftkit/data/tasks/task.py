"""The vocabulary of the classic tasks: a row as its author wrote it, a sequence as the model gets it, a prediction."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftkit.data.chat import IGNORED
from peftkit.data.part import PartOf
from peftkit.data.readers import Where

TaskName = Literal[
    "text_classification", "regression", "token_classification", "extractive_qa", "image_classification",
    "translation", "summarization",
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer of extractive QA: its text, and the character of the context that it begins at."""

    text: str
    start: int


@dataclass(frozen=True)
class TaskRow:
    """One row of a task; what its task does not have stays empty."""

    where: Where
    columns: dict[str, Any] = field(default_factory=dict)
    """What else the record held: the columns that scores can be sliced by."""
    text: str = ""
    """The text; the context of a question; the source of a translation or summary."""
    pair: str | None = None
    """The second text; the question."""
    words: tuple[str, ...] = ()
    """The words of token classification."""
    image: Path | None = None
    target: Any = None
    """A label (str), labels (tuple of str), a number (float), a tag for each word (tuple of str), answers (tuple of
    Answer, empty: there is none), a text; None where it is not known, in files to predict."""


@dataclass(frozen=True)
class TaskExample:
    """One sequence as the model gets it, with what it is to give."""

    input_ids: Sequence[int]
    """Token ids, special tokens included; of an image `range(positions)`, which says how large it is."""
    target: tuple[float, ...]
    """sequence, image: the index of the label; multi_label: 0 or 1 for every label; regression: the number.
    token: the index of a tag per token, IGNORED where none counts. span: first and last token. seq2seq: token ids."""
    row: int
    """Index of the row it comes from."""
    where: str
    type_ids: tuple[int, ...] | None = None
    """Token type ids, where the base's tokenizer gives any."""
    words: tuple[int, ...] = ()
    """token: the position of each word's first sub-token, for the words `first_word`, `first_word + 1`, …"""
    first_word: int = 0
    offsets: tuple[tuple[int, int], ...] = ()
    """span: for every token its characters [start, end) in the context; (0, 0) for tokens that are not of it."""
    image: Path | None = None
    per_token: bool = False
    """Whether `target` has an entry per token (token classification, seq2seq): each that is not IGNORED counts."""

    @property
    def labels(self) -> list[int]:
        """The target as integers, for digests: the bits of each number as a float64."""
        return [struct.unpack("<q", struct.pack("<d", float(value)))[0] for value in self.target]

    @property
    def answer_tokens(self) -> int:
        """What the loss of this sequence is a sum over: its labelled tokens, or 1."""
        return sum(value != IGNORED for value in self.target) if self.per_token else 1


@dataclass(frozen=True)
class TaskPart(PartOf[TaskRow, TaskExample]):
    """Rows of one role of a task."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one row."""

    value: Any
    """As `TaskRow.target`; of extractive QA the text of the answer, empty where there is none."""
    confidence: float | None = None
    """Probability of `value`, where the head gives one."""
    probabilities: tuple[float, ...] = ()
    """Of every label in the head's order (sequence and image heads that classify)."""
