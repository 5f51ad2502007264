"""What encoding shows: lengths, what was lost to the limit, and whether the end of an answer is learned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import Example
from peftkit.data.encoded import answer_tokens, lengths, stop_added
from peftkit.data.findings.finding import LISTED, Hit, Role, RowText, Seen, Tally
from peftkit.data.formats import Row

_PLAINLY_LITTLE = 0.01  # share of tokens with loss; one-word answers to a page of text have 0.013
_OUTLIER = 10  # times the middle row
_OUTLIER_TOKENS = 256
_BINS = 24
_ROLES: tuple[Role, ...] = ("train", "held_out")


def check_all(parts: Sequence[tuple[Sequence[Row], Sequence[Example]]], tokenizer: Tokenizer, tally: Tally) -> None:
    """Look at the encoded rows: of training first, then those held out."""
    for role, (rows, examples) in zip(_ROLES, parts, strict=True):
        _tokens(role, rows, examples, tokenizer, tally)
    added = [(examples, int(at)) for _, examples in parts for at in np.flatnonzero(stop_added(examples))]
    if added:
        tally.say("stop_added", len(added), examples=[Seen(examples[at].where, "") for examples, at in added[:LISTED]])
    if tokenizer.pad_id in tokenizer.stop_ids:
        count = sum(len(examples) for _, examples in parts)
        tally.say("pad_is_stop", count, tokenizer.decode([tokenizer.pad_id], skip_special_tokens=False))
    _trained(parts[0][1], tokenizer, tally)
    _outliers(parts, tally)


def _tokens(role: Role, rows: Sequence[Row], examples: Sequence[Example], tokenizer: Tokenizer, tally: Tally) -> None:
    """What the ids show; conversations over a tokenizer without a BOS token are not built for it."""
    if not tokenizer.bos and all(row.text is None for row in rows):
        return
    for example in examples:
        row, ids = RowText(rows[example.row], role, example.row), example.input_ids
        if tokenizer.bos and ids[:2] == tokenizer.bos * 2:
            tally.add(row, [Hit("double_bos")])
        if row.row.text is not None and any(map(ids[:-1].__contains__, tokenizer.stop_ids)):
            tally.add(row, [Hit("stop_twice")])


def _outliers(parts: Sequence[tuple[Sequence[Row], Sequence[Example]]], tally: Tally) -> None:
    counts = [lengths(examples) for _, examples in parts]
    if not sum(map(len, counts)):
        return
    middle = statistics.median(np.concatenate(counts).tolist())
    for role, (rows, examples), tokens in zip(_ROLES, parts, counts, strict=True):
        for at in np.flatnonzero(tokens > max(_OUTLIER_TOKENS, _OUTLIER * middle)):
            index = examples[int(at)].row
            hit = Hit("length_outlier", said=f"{tokens[at]:,} tokens")
            tally.add(RowText(rows[index], role, index), [hit])
    tally.say("length_outlier", 0, f"{middle:,.0f} tokens")


def _trained(examples: Sequence[Example], tokenizer: Tokenizer, tally: Tally) -> None:
    if not examples:
        return
    stops = set(tokenizer.stop_ids)
    if not any(example.labels[-1] in stops for example in examples):
        tally.say("no_stop", len(examples), f"{len(examples):,} training sequences")
    learned, tokens = int(answer_tokens(examples).sum()), int(lengths(examples).sum())
    if learned < _PLAINLY_LITTLE * tokens:
        tally.say("little_to_learn", len(examples), f"{learned / tokens:.1%}")


def histogram(*parts: Sequence[Any]) -> dict[str, Any]:
    """Tokens per sequence as counts between edges, equally wide; one more edge than counts."""
    tokens = np.concatenate([lengths(examples) for examples in parts])
    if not len(tokens):
        return {"edges": [0, 1], "counts": [0]}
    most = int(tokens.max())
    width = max(1, -(-most // _BINS))
    edges = list(range(0, most + width, width))
    counts = np.bincount(np.maximum(tokens - 1, 0) // width, minlength=len(edges) - 1)
    return {"edges": edges, "counts": counts.tolist()}
