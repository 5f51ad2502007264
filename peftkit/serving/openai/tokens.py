"""What one token adds to a text, in characters and in bytes."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable
from functools import lru_cache

from peftkit.base.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte that is no piece
_PARTIAL = "\ufffd"
_KEPT = 1 << 16  # decoding takes 20 µs, and an answer of 4,096 tokens with the 20 likeliest of each has 86,016


@lru_cache(_KEPT)
def token_text(token: int, tokenizer: Tokenizer) -> str:
    """The text that a token adds behind others: SentencePiece drops the space of the first one it decodes."""
    once = tokenizer.decode([token], skip_special_tokens=False)
    twice = tokenizer.decode([token, token], skip_special_tokens=False)
    return twice[len(once) :] if twice.startswith(once) else once


@lru_cache(_KEPT)
def token_bytes(token: int, tokenizer: Tokenizer) -> bytes | None:
    """Its bytes, which may be a part of a character; None where the tokenizer does not tell."""
    text = token_text(token, tokenizer)
    if _PARTIAL not in text:
        return text.encode()
    piece = tokenizer.hf.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return None
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    if all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece)
    return None


class Offsets:
    """Where the tokens of one answer begin in its text, in characters, told piece by piece.

    Tokens that are one character together all begin with it, and a control token takes no room.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._at = tokenizer, 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def next(self, tokens: Iterable[int]) -> list[int]:
        """Those of the next tokens."""
        offsets = []
        for token in tokens:
            text, spelled = token_text(token, self._tokenizer), token_bytes(token, self._tokenizer)
            if spelled and spelled[0] & 0xC0 != 0x80:  # the character before it ends, whole or not
                self._at += len(self._decoder.decode(b"", final=True))
            offsets.append(self._at)
            if text not in self._tokenizer.control:
                self._at += len(text if spelled is None else self._decoder.decode(spelled))
        return offsets


def _alphabet() -> dict[str, int]:
    """The bytes that characters stand for in byte-level vocabularies, as GPT-2's first had them."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _alphabet()
