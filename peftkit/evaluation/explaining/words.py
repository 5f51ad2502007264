"""Attributions of tokens, summed to the words that they are parts of."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from peftkit.data.tasks.pieces import Pieces, Span

# Chinese and Japanese write no spaces: there, every character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
SPECIAL = "special"


@dataclass(frozen=True)
class Word:
    """A word and its share of the score; a special token counts as one."""

    text: str
    part: str
    """text, pair, question, context, or special."""
    value: float


@dataclass(frozen=True)
class Part:
    """One of the texts of a sequence: its name, its characters, and where its words are."""

    name: str
    text: str
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, name: str, text: str) -> Part:
        """A text whose words stand between spaces."""
        return cls(name, text, tuple(found.span() for found in _WORD.finditer(text)))

    @classmethod
    def of_words(cls, name: str, words: Sequence[str]) -> Part:
        """Words that are given, joined by single spaces."""
        starts = [0, *accumulate(len(word) + 1 for word in words)][:-1]
        spans = tuple((start, start + len(word)) for start, word in zip(starts, words, strict=True))
        return cls(name, " ".join(words), spans)


def by_word(
    values: Sequence[float], tokens: Sequence[str], whole: Pieces, first: Part, second: Part | None
) -> list[Word]:
    """The words of a sequence in their order with the sums of their tokens' values; all values are in one word.

    A token counts for the word that it begins in; one of spaces alone for the word after it, or the last word of its
    text. Special tokens stand for themselves. `values` and `tokens` have an entry per token of `whole`.
    """
    bounds = [(whole.first, first), *([(whole.second, second)] if second is not None else [])]
    starting = {positions.start: (positions, part) for positions, part in bounds if positions}
    found: list[Word] = []
    at = 0
    while at < len(values):
        if at in starting:
            positions, part = starting[at]
            found += _words(values, whole.offsets, positions, part)
            at = positions.stop
        else:
            found.append(Word(tokens[at], SPECIAL, values[at]))
            at += 1
    return found


def _words(values: Sequence[float], offsets: Sequence[Span], positions: range, part: Part) -> list[Word]:
    spans = part.spans or ((0, len(part.text)),)
    starts, sums, waiting = [start for start, _ in spans], [0.0] * len(spans), 0.0
    last = len(spans) - 1
    for at in positions:
        waiting += values[at]
        if offsets[at][0] < offsets[at][1]:
            last = max(bisect_right(starts, offsets[at][0]) - 1, 0)
            sums[last] += waiting
            waiting = 0.0
    sums[last] += waiting
    return [Word(part.text[start:end], part.name, value) for (start, end), value in zip(spans, sums, strict=True)]
