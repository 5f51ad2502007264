"""Tags of words: which scheme they follow, and IOB1, BIOES and BILOU rewritten as BIO (also called IOB2).

In BIO an entity begins with B-type and goes on with I-type. IOB1 (Ramshaw and Marcus 1995; CoNLL-2003's files) writes
B- only where an entity follows another of its type without a gap. BIOES and BILOU mark last words (E, L) and single
words (S, U) too. Tags without such prefixes, as for parts of speech, are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["BIO", "IOB1", "BIOES", "plain"]
_ENTITY = re.compile(r"([BIESLUM])-(\S+)")
_OUTSIDE = "O"
_AS_BIO = {"B": "B", "I": "I", "M": "I", "E": "I", "L": "I", "S": "B", "U": "B"}


@dataclass(frozen=True)
class Tags:
    """The tags of a file, read."""

    scheme: Scheme
    tags: tuple[tuple[str, ...], ...]
    """In BIO, or plain."""
    broken: tuple[tuple[int, int, str], ...]
    """Sentence, word and what is wrong there."""


def read_tags(sentences: Sequence[Sequence[str]]) -> Tags:
    """Tell the scheme from all tags of a file, and rewrite them as BIO."""
    kinds = {tag for sentence in sentences for tag in sentence}
    prefixes = {match[1] for tag in kinds if (match := _ENTITY.fullmatch(tag))}
    kept = tuple(map(tuple, sentences))
    if not prefixes:
        return Tags("plain", kept, ())
    broken = [
        (at, word, f"the tag {tag!r} is neither {_OUTSIDE} nor a prefix and a type, such as B-person")
        for at, sentence in enumerate(kept)
        for word, tag in enumerate(sentence)
        if tag != _OUTSIDE and not _ENTITY.fullmatch(tag)
    ]
    if prefixes <= {"B", "I"}:
        breaks = [] if broken else _breaks(kept)
        if breaks and _is_iob1(kept):
            return Tags("IOB1", tuple(map(_from_iob1, kept)), ())
        return Tags("BIO", kept, (*broken, *breaks))
    broken += [] if broken else _breaks_of_ends(kept)
    return Tags("BIOES", tuple(tuple(map(_bio, sentence)) for sentence in kept), tuple(broken))


def _split(tag: str) -> tuple[str, str]:
    """Prefix and type; "O" has no type."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def _bio(tag: str) -> str:
    prefix, kind = _split(tag)
    return f"{_AS_BIO[prefix]}-{kind}" if prefix in _AS_BIO and kind else tag


def _breaks(sentences: Sequence[Sequence[str]]) -> list[tuple[int, int, str]]:
    """Every I- that goes on with nothing."""
    found = []
    for at, sentence in enumerate(sentences):
        before = _OUTSIDE
        for word, tag in enumerate(sentence):
            if tag.startswith("I-") and _split(before)[1] != _split(tag)[1]:
                after = f"after {before!r}" if word else "at the beginning of a sentence"
                found.append((at, word, f"the tag {tag!r} {after}: an entity begins with {'B' + tag[1:]!r}"))
            before = tag
    return found


def _is_iob1(sentences: Sequence[Sequence[str]]) -> bool:
    """Whether every B- follows an entity of its own type, as in IOB1."""
    return all(
        word > 0 and _split(sentence[word - 1])[1] == _split(tag)[1]
        for sentence in sentences
        for word, tag in enumerate(sentence)
        if tag.startswith("B-")
    )


def _from_iob1(sentence: Sequence[str]) -> tuple[str, ...]:
    begins = {word for _, word, _ in _breaks([sentence])}
    return tuple("B" + tag[1:] if word in begins else tag for word, tag in enumerate(sentence))


def _breaks_of_ends(sentences: Sequence[Sequence[str]]) -> list[tuple[int, int, str]]:
    """Every tag of BIOES that cannot follow the one before it, and every entity without its last word."""
    found = []
    for at, sentence in enumerate(sentences):
        before = _OUTSIDE
        for word, tag in enumerate((*sentence, _OUTSIDE)):
            inside = _split(before)[0] in ("B", "I", "M")
            goes_on = _split(tag)[0] in ("I", "M", "E", "L")
            same = _split(before)[1] == _split(tag)[1]
            if goes_on and not (inside and same):
                found.append((at, word, f"the tag {tag!r} goes on with no entity"))
            elif inside and not goes_on:
                found.append((at, word - 1, f"the entity that {before!r} belongs to has no last word (E- or L-)"))
            before = tag
    return found


def tag_names(tags: set[str]) -> tuple[str, ...]:
    """Names in their order: O, then B- and I- of every type; plain tags sorted.

    Both of a type are there even if the rows show one: a single word today may be two tomorrow.
    """
    types = sorted({_split(tag)[1] for tag in tags if _ENTITY.fullmatch(tag)})
    if not types:
        return tuple(sorted(tags))
    return (_OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))
