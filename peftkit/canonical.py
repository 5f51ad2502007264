"""JSON that has one reading and one spelling: what version ids and digests are computed from."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, NoReturn


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value; ValueError on NaN, infinity and halves of a character."""
    data = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if b"\\ud" in data:
        _refuse_halves(value)
    return data


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def strict_json(data: bytes) -> Any:
    """Parse JSON that every parser reads alike; ValueError says what is wrong with it.

    Refused although Python's parser takes them: NaN, infinity and what no float can hold (`1e999`), halves of a
    character (`"\\ud800"`), and a key that stands twice, because parsers disagree on which one counts.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_representable,
            object_pairs_hook=_unique,
        )
        if b"\\ud" in data.lower():
            _refuse_halves(value)
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_halves(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half a character, which UTF-8 cannot spell") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _representable(text: str) -> int:
    number = int(text)
    try:
        float(number)
    except OverflowError:
        raise ValueError(f"{text[:20]}… is too large for a number") from None
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found
