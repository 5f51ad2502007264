"""How much of the held-out texts already stands in the training texts, by word n-grams."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftkit.errors import ConfigError, DataError

# Chinese and Japanese are written without spaces: there a character counts as a word
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")


@dataclass(frozen=True)
class Overlap:
    """Shares of a held-out text's n-grams that occur in training, and how many texts stand there whole."""

    highest: float
    highest_index: int
    mean: float
    rows_sharing: int
    exact_duplicates: int


def ngram_overlap(held_out: Sequence[str], train: Sequence[str], n: int = 8) -> Overlap:
    """Measure for each held-out text the share of its n-grams of words that occur anywhere in the training texts.

    Words are compared without case and punctuation. A text of fewer than n words is one n-gram, all its words, and is
    shared only with a training text of just these words (else every "yes" would count as leaked); a text without words
    shares nothing. `highest_index` is the first text with the highest share. An exact duplicate equals a training text
    character by character.

    Raises ConfigError for n below 1, DataError without held-out texts.
    """
    if n < 1:
        raise ConfigError([f"n: {n!r} is less than 1"])
    if not held_out:
        raise DataError("no held-out texts to compare with the training texts", expected="at least one")
    grams = [list(_ngrams(text, n)) for text in held_out]
    wanted = {gram for row in grams for gram in row}
    seen = {gram for text in train for gram in _ngrams(text, n) if gram in wanted}
    shares = [sum(gram in seen for gram in row) / len(row) if row else 0.0 for row in grams]
    whole = set(train)
    return Overlap(
        highest=max(shares),
        highest_index=shares.index(max(shares)),
        mean=sum(shares) / len(shares),
        rows_sharing=sum(share > 0 for share in shares),
        exact_duplicates=sum(text in whole for text in held_out),
    )


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    if 0 < len(words) < n:
        yield tuple(words)
    for at in range(len(words) - n + 1):
        yield tuple(words[at : at + n])
