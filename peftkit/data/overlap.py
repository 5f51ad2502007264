"""How much of the held-out texts already stands in the training texts, by word n-grams."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftkit.data.formats import Row
from peftkit.errors import ConfigError, DataError

# Chinese and Japanese are written without spaces: there a character counts as a word
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_FEWEST = 6
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
    seen: set[tuple[str, ...]] = set()
    for text in train:
        seen.update(wanted.intersection(_ngrams(text, n)))
    shares = [sum(gram in seen for gram in row) / len(row) if row else 0.0 for row in grams]
    whole = set(train)
    return Overlap(
        highest=max(shares),
        highest_index=shares.index(max(shares)),
        mean=sum(shares) / len(shares),
        rows_sharing=sum(share > 0 for share in shares),
        exact_duplicates=sum(text in whole for text in held_out),
    )


def highest_overlap(held_out: Sequence[Row], train: Sequence[Row]) -> float:
    """The highest share of a held-out prompt's word 8-grams that occur anywhere in the training prompts.

    Raises DataError without held-out rows.
    """
    return ngram_overlap(prompts(held_out), prompts(train)).highest


def prompts(rows: Sequence[Row]) -> list[str]:
    """What the user and tools say in each row; a plain text whole."""
    return [
        row.text
        if row.text is not None
        else "\n".join(str(m.get("content") or "") for m in row.messages if m["role"] not in ("assistant", "system"))
        for row in rows
    ]


@dataclass(frozen=True)
class Shared:
    """The text that holds most of another, and how much."""

    index: int
    share: float


def shared_runs(texts: Sequence[str], inside: Sequence[str], n: int = 8) -> dict[int, Shared]:
    """For each of `texts` of at least n words, the one of `inside` that holds most of its runs of n words.

    Runs in more than 1 % of `inside` (and more than ten of them) are a task's own wording and do not count; nor does a
    text whose runs are mostly such. Texts that share fewer than six runs are left out: six runs of eight words are 13
    words in a row, from which on GPT-3 counted a text as seen (Brown et al. 2020, appendix C).
    """
    grams = [set(_ngrams(text, n)) if len(words(text)) >= n else set() for text in texts]
    places: dict[tuple[str, ...], list[int]] = {gram: [] for row in grams for gram in row}
    most = max(10, len(inside) // 100)
    for at, text in enumerate(inside):
        for gram in places.keys() & set(_ngrams(text, n)):
            if len(places[gram]) <= most:
                places[gram].append(at)
    found = {}
    for at, row in enumerate(grams):
        rare = [places[gram] for gram in row if len(places[gram]) <= most]
        counts = Counter(index for indices in rare for index in indices)
        if counts and len(rare) >= 0.25 * len(row):
            index, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
            if count >= _FEWEST:
                found[at] = Shared(index, count / len(rare))
    return found


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation; in Chinese and Japanese, its characters."""
    return _WORD.findall(text.casefold())


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    if 0 < len(found) < n:
        return iter([tuple(found)])
    return zip(*(found[start:] for start in range(n)), strict=False)
