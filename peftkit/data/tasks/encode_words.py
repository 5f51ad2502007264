"""Words with tags → windows of sub-tokens in which every word counts once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import IGNORED
from peftkit.data.tasks.encoding import Encoding, Policy
from peftkit.data.tasks.pieces import Pieces, tokenize
from peftkit.data.tasks.problems import Problems
from peftkit.data.tasks.task import TaskExample, TaskRow
from peftkit.data.tasks.windows import owner, windows

LOST = -1
"""Position of a word that has no sub-token of its own."""


def encode_words(
    rows: Sequence[TaskRow], head: Head, tokenizer: Tokenizer, policy: Policy, found: Encoding, *, labelled: bool
) -> None:
    """One sequence for a row, or its windows; each lists the words that count in it, with their positions.

    Words are joined by single spaces before they become tokens, so that tokenizers which tell " word" from "word" see
    text. A word without a token of its own (a tokenizer that removes control characters) has the position -1, and is
    listed in `found.unseen`; a row of nothing else is dropped. Raises DataError when windows leave no room.
    """
    problems, numbers = Problems("windows"), {label: number for number, label in enumerate(head.labels)}
    pieces = tokenize(tokenizer, [" ".join(row.words) for row in rows])
    for at, (row, whole) in enumerate(zip(rows, pieces, strict=True)):
        where = str(row.where)
        if found.refused(where, len(whole.ids), policy):
            continue
        positions = first_tokens(row.words, whole)
        if lost := [word for word, position in zip(row.words, positions, strict=True) if position == LOST]:
            found.unseen[where] = " ".join(f"{word!a}" for word in lost)
        if all(position == LOST for position in positions):
            found.dropped[where] = None
            continue
        try:
            over = _windows(whole, policy)
        except ValueError as error:
            problems.add(where, str(error))
            continue
        if policy.over(len(whole.ids)) and policy.too_long == "truncate":
            found.truncated[where] = None
        tags = [numbers[tag] for tag in row.target] if labelled else None
        owned = _owned(positions, whole.first, over)
        for window, words in zip(over, owned, strict=True):
            if any(positions[word] != LOST for word in words):
                found.examples.append(_example(whole, window, words, positions, tags, at, where))
    problems.refuse(len(rows), "windows that move on", "set data.max_length higher or data.stride lower")


def first_tokens(words: Sequence[str], whole: Pieces) -> list[int]:
    """Of every word the position of its first sub-token: the first that begins in it; -1 where none does."""
    starts = [0, *accumulate(len(word) + 1 for word in words)][:-1]
    positions = [LOST] * len(words)
    for at in whole.first:
        start, end = whole.offsets[at]
        if start < end:
            word = bisect_right(starts, start) - 1
            if positions[word] == LOST:  # a token never begins at a space between words: offsets are without spaces
                positions[word] = at
    return positions


def _windows(whole: Pieces, policy: Policy) -> list[range]:
    length = len(whole.first)
    room = length if policy.length is None else policy.length - (len(whole.ids) - length)
    if policy.too_long == "truncate" and room < length:
        return [range(max(room, 0))]
    return windows(length, room, policy.stride)


def _owned(positions: Sequence[int], body: range, over: Sequence[range]) -> list[range]:
    """The words that count in each window, which lie side by side; lost ones go with the word before them.

    Words that no window holds (of a row that was cut) are in none.
    """
    bounds = [[0, 0] for _ in over]
    last = begun = 0
    for word, position in enumerate(positions):
        if position != LOST:
            place = position - body.start
            if not any(place in window for window in over):
                break
            at = owner(place, over)
            if at != last or not begun:
                bounds[at][0] = word if begun else 0  # lost words before the first one go with it
            last, begun = at, 1
        bounds[last][1] = word + 1
    return [range(first, end) for first, end in bounds]


def _example(
    whole: Pieces,
    window: range,
    words: range,
    positions: Sequence[int],
    tags: Sequence[int] | None,
    at: int,
    where: str,
) -> TaskExample:
    body = whole.first
    kept = whole.keep(body[window.start : window.stop], range(0))
    ids, types = whole.take(kept)
    here = [LOST if positions[word] == LOST else positions[word] - window.start for word in words]
    target = [IGNORED] * len(ids)
    for word, position in zip(words, here, strict=True):
        if tags is not None and position != LOST:
            target[position] = tags[word]
    return TaskExample(ids, tuple(target), at, where, types, tuple(here), words.start, per_token=True)
