"""Texts and pairs of texts as tokens: which positions are of which text, and which characters each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import BaseError

_BETWEEN = "\n"
Span = tuple[int, int]


@dataclass(frozen=True)
class Pieces:
    """One text, or a pair, with the special tokens that its tokenizer writes around them."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None
    """Token type ids, where the tokenizer's model takes any."""
    offsets: tuple[Span, ...]
    """Of every token its characters [start, end) in its own text, without spaces around them; (0, 0) of others."""
    first: range
    """Positions of the first text's tokens."""
    second: range
    """Positions of the second text's tokens; empty without one."""

    def keep(self, first: range, second: range) -> list[int]:
        """The positions that stay when only these tokens of the two texts do; special tokens all stay."""
        gone = {*self.first, *self.second} - {*first, *second}
        return [at for at in range(len(self.ids)) if at not in gone]

    def take(self, kept: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Ids and type ids at these positions."""
        types = None if self.type_ids is None else tuple(self.type_ids[at] for at in kept)
        return tuple(self.ids[at] for at in kept), types


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str | None] = ()) -> list[Pieces]:
    """Encode texts, each with its pair where it has one, as the tokenizer's own template says.

    A tokenizer that writes nothing between two texts (GPT-2's and most causal ones') gets a line end there, as the last
    word of one and the first of the other would else run into one. Raises BaseError for a slow tokenizer, which does
    not say what its tokens stand for.
    """
    hf = tokenizer.hf
    if not getattr(hf, "is_fast", False):
        fact = f"the tokenizer {type(hf).__name__} is a slow one: it does not say which characters its tokens stand for"
        raise BaseError(fact, expected="a fast tokenizer (tokenizer.json)", hint="use a base that ships tokenizer.json")
    typed = "token_type_ids" in hf.model_input_names
    joins = any(pair is not None for pair in pairs) and not _separates(hf)
    found: list[Pieces] = []
    whole = [(text, None) for text in texts] if not pairs else list(zip(texts, pairs, strict=True))
    for has_pair in (False, True):
        given = [(text, pair) for text, pair in whole if (pair is not None) == has_pair]
        if not given:
            continue
        if not has_pair or joins:
            lines = [text if pair is None else f"{text}{_BETWEEN}{pair}" for text, pair in given]
            encoded = hf(lines, return_offsets_mapping=True, verbose=False).encodings
        else:
            lines = [text for text, _ in given]
            encoded = hf(lines, [p for _, p in given], return_offsets_mapping=True, verbose=False).encodings
        found += [
            _joined(one, text, pair, typed) if joins and pair is not None else _pieces(one, (text, pair or ""), typed)
            for one, (text, pair) in zip(encoded, given, strict=True)
        ]
    order = sorted(range(len(whole)), key=lambda at: whole[at][1] is not None)  # stable: those without a pair first
    placed = dict(zip(order, found, strict=True))
    return [placed[at] for at in range(len(whole))]


def _separates(hf: Any) -> bool:
    """Whether a special token stands between the two texts of a pair."""
    sides = hf("a", "b", verbose=False).encodings[0].sequence_ids
    return None in sides[sides.index(0) : sides.index(1)]


def _pieces(encoding: Any, texts: tuple[str, str], typed: bool) -> Pieces:
    sides = encoding.sequence_ids
    offsets = [
        (0, 0) if side is None else trimmed(span, texts[side])
        for side, span in zip(sides, encoding.offsets, strict=True)
    ]
    types = tuple(encoding.type_ids) if typed else None
    return Pieces(tuple(encoding.ids), types, tuple(offsets), _run(sides, 0), _run(sides, 1))


def _joined(encoding: Any, text: str, pair: str, typed: bool) -> Pieces:
    """A pair that was encoded as one text: a token belongs to the text that it begins in."""
    border, whole = len(text) + len(_BETWEEN), f"{text}{_BETWEEN}{pair}"
    sides: list[int | None] = []
    shifted: list[Span] = []
    for side, span in zip(encoding.sequence_ids, encoding.offsets, strict=True):
        later = side is not None and span[0] >= border
        sides.append(1 if later else side)
        start, end = (0, 0) if side is None else trimmed(span, whole)
        shifted.append((start - border, end - border) if later and end else (start, end))
    types = tuple(encoding.type_ids) if typed else None
    return Pieces(tuple(encoding.ids), types, tuple(shifted), _run(sides, 0), _run(sides, 1))


def _run(sides: Sequence[int | None], side: int) -> range:
    """The positions of one text, which lie side by side."""
    positions = [at for at, one in enumerate(sides) if one == side]
    return range(positions[0], positions[-1] + 1) if positions else range(0)


def trimmed(span: Span, text: str) -> Span:
    """A span of a text without the spaces at its ends; (0, 0) where nothing else is in it."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return (start, end) if start < end else (0, 0)
