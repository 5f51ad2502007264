"""What encoding shows: lengths, what was lost to the limit, and whether the end of an answer is learned."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import Example
from peftkit.data.findings.finding import LISTED, Hit, Role, RowText, Seen, Tally
from peftkit.data.formats import Row

_PLAINLY_LITTLE = 0.01  # share of tokens with loss; one-word answers to a page of text have 0.013
_OUTLIER = 10  # times the middle row
_OUTLIER_TOKENS = 256
_BINS = 24
_ROLES: tuple[Role, ...] = ("train", "held_out")


def check_all(parts: Sequence[tuple[Sequence[Row], Sequence[Example]]], tokenizer: Tokenizer, tally: Tally) -> None:
    """Look at the encoded rows: of training first, then those held out."""
    pairs = [
        (RowText(rows[example.row], role, example.row), example)
        for role, (rows, examples) in zip(_ROLES, parts, strict=True)
        for example in examples
    ]
    for row, example in pairs:
        tally.add(row, _tokens(row, example, tokenizer))
    added = sum(example.stop_added for _, example in pairs)
    if added:
        tally.say("stop_added", added, examples=[Seen(e.where, "") for _, e in pairs if e.stop_added][:LISTED])
    if tokenizer.pad_id in tokenizer.stop_ids:
        tally.say("pad_is_stop", len(pairs), tokenizer.decode([tokenizer.pad_id], skip_special_tokens=False))
    _trained(parts[0][1], tokenizer, tally)
    if pairs:
        _outliers(pairs, tally)


def _tokens(row: RowText, example: Example, tokenizer: Tokenizer) -> Iterator[Hit]:
    ids = example.input_ids
    if tokenizer.bos and ids[:2] == tokenizer.bos * 2:
        yield Hit("double_bos")
    if row.row.text is not None and any(map(ids[:-1].__contains__, tokenizer.stop_ids)):
        yield Hit("stop_twice")


def _outliers(pairs: Sequence[tuple[RowText, Example]], tally: Tally) -> None:
    middle = statistics.median(len(example.input_ids) for _, example in pairs)
    for row, example in pairs:
        if len(example.input_ids) > max(_OUTLIER_TOKENS, _OUTLIER * middle):
            tally.add(row, [Hit("length_outlier", said=f"{len(example.input_ids):,} tokens")])
    tally.say("length_outlier", 0, f"{middle:,.0f} tokens")


def _trained(examples: Sequence[Example], tokenizer: Tokenizer, tally: Tally) -> None:
    if not examples:
        return
    stops = set(tokenizer.stop_ids)
    if not any(example.labels[-1] in stops for example in examples):
        tally.say("no_stop", len(examples), f"{len(examples):,} training sequences")
    learned, tokens = sum(example.answer_tokens for example in examples), sum(len(e.input_ids) for e in examples)
    if learned < _PLAINLY_LITTLE * tokens:
        tally.say("little_to_learn", len(examples), f"{learned / tokens:.1%}")


def histogram(examples: Sequence[Example]) -> dict[str, Any]:
    """Tokens per sequence as counts between edges, equally wide; one more edge than counts."""
    lengths = [len(example.input_ids) for example in examples]
    if not lengths:
        return {"edges": [0, 1], "counts": [0]}
    width = max(1, -(-max(lengths) // _BINS))
    edges = list(range(0, max(lengths) + width, width))
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[min(bisect_right(edges, length - 1) - 1, len(counts) - 1)] += 1
    return {"edges": edges, "counts": counts}
