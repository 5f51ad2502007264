"""JSON that has one reading: what digests are computed from, and what is read from strangers."""

from __future__ import annotations

import pytest

from peftkit.canonical import canonical_json, digest_json, strict_json

HALF = "\ud800"


def test_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ß😀"}) == (
        b'{"a":"\\u00df\\ud83d\\ude00","b":[1,2.5,null,true]}'
    )
    assert digest_json({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of "{}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), HALF, {"a": [HALF]}, {HALF: 1}])
def test_what_has_no_spelling(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_json(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"NaN", "not a JSON number"),
        (b"-Infinity", "not a JSON number"),
        (b"1e999", "too large"),
        (b'{"a":1,"a":2}', "stands twice"),
        (b'{"a":{"b":1,"\\u0062":2}}', "stands twice"),
        (b'"\xff"', "not UTF-8"),
        (b'["\\ud800"]', "half a character"),
        (b'{"\\uDFFF":1}', "half a character"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
)
def test_what_parsers_disagree_on(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        strict_json(text)


def test_what_is_fine() -> None:
    assert strict_json(b' {"a": "\\ud83d\\ude00", "b": "\\\\ud800", "c": -0.0} ') == {
        "a": "😀",
        "b": "\\ud800",
        "c": 0.0,
    }
