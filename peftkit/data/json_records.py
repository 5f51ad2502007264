"""JSON and JSON Lines → objects with the line each starts on; broken text is refused with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from peftkit.errors import DataError

Numbered = Iterator[tuple[int | None, dict[str, Any]]]  # the line, None where it is not known
_LIST_KEYS = ("data", "rows", "train")
_LISTED = 20
_MEND = "mend or remove it; peftkit drops no row by itself"
_SPACE = re.compile(r"[ \t\r\n]*")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse a key given twice, of which Python would silently keep the last."""
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in {earlier for earlier, _ in pairs[:at]})
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def parse_json(text: str) -> Any:
    """Parse one JSON value; raises ValueError (also for a key given twice) or RecursionError (nested too deep)."""
    return _DECODER.decode(text)


def json_objects(text: str, name: str) -> Numbered:
    """Yield the objects of an array, or of the one list of rows in an object."""
    start = _skip(text, 0)
    if text.startswith("[", start):
        for line, row in _elements(text, start, name):
            yield line, _object(row, f"{name}:{line}")
        return
    whole, _ = _value(text, start, name) if start < len(text) else ({"rows": []}, 0)
    keys = list(whole) if isinstance(whole, dict) else []
    lists = [key for key in _LIST_KEYS if key in keys and isinstance(whole[key], list)]
    if len(lists) != 1:
        shown = f"{type(whole).__name__} (keys: {', '.join(keys[:8]) or 'none'})"
        raise DataError(
            f"{name}: starts with one {shown} in which {len(lists)} lists could be the rows",
            expected=f"an array of rows, or an object with one list under {', '.join(_LIST_KEYS)}",
            hint="where each line is an object, rename the file to .jsonl",
        )
    for index, row in enumerate(whole[lists[0]]):
        yield None, _object(row, f"{name}[{index}]")


def _elements(text: str, at: int, name: str) -> Iterator[tuple[int, Any]]:
    """Yield each element of the array that opens at `at` with the line it starts on."""
    at, line, counted = _skip(text, at + 1), 1, 0
    more = not text.startswith("]", at)
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value(text, at, name)
        yield line, value
        at = _skip(text, at)
        more = text.startswith(",", at)
        if not more and not text.startswith("]", at):
            raise _broken(text, at, name, "the array does not go on here", "',' or ']'")
        at = _skip(text, at + 1) if more else at
    at = _skip(text, at + 1)
    if at < len(text):
        raise _broken(text, at, name, "more text after the end of the array", "one array")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _value(text: str, at: int, name: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _broken(text, error.pos, name, error.msg, "a JSON value") from error
    except (ValueError, RecursionError) as error:
        raise _broken(text, at, name, str(error), "one JSON value that Python can hold") from error


def _broken(text: str, at: int, name: str, why: str, expected: str) -> DataError:
    cut = at >= len(text.rstrip()) or why.startswith("Unterminated")
    ends = "; the file ends inside a value: was it cut off?" if cut else ""
    place = f"{name}:{text.count(chr(10), 0, at) + 1}"
    column = at - text.rfind("\n", 0, at)
    return DataError(f"{place}: broken JSON at column {column}: {why}{ends}", expected=expected)


def _object(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise DataError(f"{place}: a row is {type(row).__name__} ({row!r:.60})", expected="an object, {…}", hint=_MEND)


def jsonl_objects(text: str, name: str) -> Numbered:
    """Yield the object on each line that is not blank; all lines that hold none are named at once, after the others."""
    # split on \n only: str.splitlines would also cut at U+2028 and others, which JSON allows inside a string
    lines, first = text.split("\n"), True
    broken: list[DataError] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t\r"):
            continue
        if first and line.lstrip().startswith("["):
            fact = f"{name}:{number}: starts with '[': an array"
            raise DataError(fact, expected="an object on each line", hint="rename the file to .json")
        try:
            yield number, _object(_parsed(line, number, len(lines), name), f"{name}:{number}")
        except DataError as error:
            broken.append(error)
        first = False
    if len(broken) == 1:
        raise broken[0]
    if broken:
        listed = "".join(f"\n- {error.fact}" for error in broken[:_LISTED])
        more = f"\n- and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
        fact = f"{name}: {len(broken)} lines hold no row:{listed}{more}"
        raise DataError(fact, expected="one whole JSON object on each line", hint=_MEND)


def _parsed(line: str, number: int, last: int, name: str) -> Any:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        fact = "the last line is cut off or broken" if number == last else "broken JSON"
        raise DataError(
            f"{name}:{number}: {fact}: {reason}: {line.strip()!r:.80}",
            expected="one whole JSON object on each line",
            hint="fetch or write the file again: rows may be missing" if number == last else _MEND,
        ) from error
