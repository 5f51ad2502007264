"""Text that was damaged on its way into the file."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator
from operator import eq

from peftkit.data.findings.finding import Hit, RowText

_CONTROL = frozenset(chr(code) for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Joiners and the direction marks have uses in emoji, Persian, Hebrew and Indic scripts: only what has none counts.
_INVISIBLE = frozenset("\u200b\u2060\ufeff\u00ad\u180e\u2062\u2063\u2064") | frozenset(
    map(chr, range(0xE0000, 0xE0080))
)
_PRIVATE = range(0xE000, 0xF900)
_TAG = re.compile(
    r"</?(?:div|span|p|br|table|tr|td|th|ul|ol|li|a|font|img|h[1-6]|script|style|body|html|strong|em)"
    r"(?:\s+[a-z-]+\s*=\s*[\"'][^<>]*)?\s*/?>"
)
_ENTITY = re.compile(r"&(?:nbsp|amp|lt|gt|quot|#39|#x27|#\d{2,5}|rsquo|lsquo|ldquo|rdquo|mdash|ndash|hellip|apos);")
_MARKUP_MEANT = re.compile(
    r"\b(?:x?html|css|xml|tags?|web ?pages?|website|javascript|svg|jsx|markup)\b|```|网页|标签", re.I
)
_ESCAPED = re.compile(r"\\u[0-9a-fA-F]{4}|(?:\\n|\\t|\\\"){2,}|[.!?,:;]\\n(?=[A-Z\d*-])")
_CODE_MEANT = re.compile(r"```|\bprint\b|\bdef \b|\bregex\b|[\"'`]\\[nt]|\\(?:begin|frac|text|nu|times|theta|tau|ne)")
_REPEATED = re.compile(r"(\b\w[\w' ,.-]{0,40}?\W+)\1{14,}", re.S)
_LONGEST_WORD = 200


def check(row: RowText) -> Iterator[Hit]:
    """What is wrong with the characters of one row."""
    text, chars = row.whole, row.chars
    if not text.isascii():
        yield from _beyond_ascii(text, chars)
    if chars & _CONTROL:
        yield _at("control_char", text, chars & _CONTROL)
    if ("<" in chars or "&" in chars) and not _MARKUP_MEANT.search(text):
        found = _TAG.search(text) or _ENTITY.search(text)
        if found:
            yield Hit("html", *found.span())
    if "\\" in chars and not _CODE_MEANT.search(text):
        found = _ESCAPED.search(text)
        if found:
            yield Hit("escaped", *found.span())
    if len(text) > _LONGEST_WORD:
        yield from _long(text)


def _beyond_ascii(text: str, chars: frozenset[str]) -> Iterator[Hit]:
    if "\ufffd" in chars:
        yield _at("replacement_char", text, {"\ufffd"})
    if chars & _BIDI:
        yield _at("bidi_control", text, chars & _BIDI)
    if chars & _INVISIBLE:
        yield _at("invisible_char", text, chars & _INVISIBLE)
    private = {char for char in chars if ord(char) in _PRIVATE}
    if private:
        yield _at("private_use", text, private)
    if any("\x80" <= char <= "\u2122" for char in chars):
        from ftfy.badness import is_bad

        # Line by line: what looks wrong across a line end is two lines that have nothing to do with each other.
        bad = next((line for line in text.splitlines() if not line.isascii() and is_bad(line)), None)
        if bad is not None:
            start = text.index(bad)
            yield Hit("mojibake", start + _first_beyond_ascii(bad), start + _first_beyond_ascii(bad) + 8)


def _first_beyond_ascii(line: str) -> int:
    return next(at for at, char in enumerate(line) if not char.isascii())


def _at(rule: str, text: str, chars: set[str] | frozenset[str]) -> Hit:
    start = min(text.index(char) for char in chars)
    name = unicodedata.name(text[start], f"U+{ord(text[start]):04X}")
    return Hit(rule, start, start + 1, name)


def _long(text: str) -> Iterator[Hit]:
    longest = max(text.split(), key=len, default="")
    # Scripts without spaces have long words by nature; an address on the web may be long.
    if len(longest) > _LONGEST_WORD and longest.isascii() and "://" not in longest:
        start = text.index(longest)
        yield Hit("unbroken", start, start + len(longest), f"{len(longest):,} characters")
    # Prose packs to 0.35 of its size and more, code and tables to 0.15; what a loop wrote goes far below.
    data = text.encode("utf-8", "replace")
    if len(data) >= 400 and len(zlib.compress(data, 1)) < 0.08 * len(data):
        yield Hit("repetitive", said="", start=0, end=min(len(text), 40))
    elif len(text) >= 60:
        found = _REPEATED.search(text) if _has_run(text) else None
        if found:
            yield Hit("repetitive", *found.span())


def _has_run(text: str) -> bool:
    """Whether words repeat at a short distance, as they do in every run of up to eight words."""
    words = text.split()
    return any(sum(map(eq, words, words[step:])) >= 12 for step in range(1, 9))
