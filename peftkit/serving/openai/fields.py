"""Read the JSON object of a request: every problem is collected, and a key that nothing reads is one of them."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftkit.canonical import strict_json
from peftkit.serving.openai.failures import Refused

_DEEPEST = 100
"""Levels of a body. Deeper ones reach Python's limit of 1000 frames where they are read, or written into a prompt."""
_SHOWN = 80
_LISTED = 20


class Problems:
    """What is wrong with a request."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    @property
    def full(self) -> bool:
        """Whether more would help nobody: a body of 100,000 wrong keys is answered as soon as one of 20."""
        return len(self._said) >= _LISTED

    def add(self, param: str, said: str) -> None:
        """One more; the first one of a parameter counts."""
        if not self.full:
            self._said.setdefault(param, said)

    def check(self) -> None:
        """Raise Refused with all of them, if there are any."""
        if not self._said:
            return
        said = list(self._said.values())
        count = f"{len(said)} problems in the request" if not self.full else "many problems in the request, at first"
        whole = said[0] if len(said) == 1 else count + "".join(f"\n- {each}" for each in said)
        raise Refused(400, whole, param=next(iter(self._said)))


class Fields:
    """The fields of one object. Null is the same as absent, as OpenAI's clients have it."""

    def __init__(self, given: Mapping[str, Any], problems: Problems, where: str = "") -> None:
        self.where = where
        self.problems = problems
        self._given = given
        self._read: list[str] = []

    @classmethod
    def of(cls, body: bytes) -> Fields:
        """The fields of a body. Raises Refused when it is not a JSON object."""
        try:
            given = strict_json(body)
            deep = _deeper_than(given, _DEEPEST)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body cannot be read as JSON: {error}", code="invalid_json") from error
        if deep:
            raise Refused(400, f"the body is nested deeper than {_DEEPEST} levels", code="invalid_json")
        if not isinstance(given, dict):
            raise Refused(400, f"the body is {kind(given)}: expected a JSON object", code="invalid_json")
        return cls(given, Problems())

    def name(self, key: str) -> str:
        """A field's name with where it stands: `messages[2].content`."""
        return f"{self.where}.{key}" if self.where else key

    def get(self, key: str) -> Any:
        """Whatever it is; None when absent."""
        self._read.append(key)
        return self._given.get(key)

    def wrong(self, key: str, said: str) -> None:
        """Something is wrong with a field: `said` goes on after its name."""
        self.problems.add(self.name(key), f"{self.name(key)} {said}")

    def text(self, key: str, *, required: bool = False) -> str | None:
        """A string."""
        value: str | None = self._typed(key, str, "a string", required)
        return value

    def flag(self, key: str) -> bool:
        """True or false; false when absent."""
        return bool(self._typed(key, bool, "true or false", False))

    def whole(self, key: str, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        value = self.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.wrong(key, f"is {shown(value)}: expected a whole number from {least} to {most}")
            return None
        return value

    def number(self, key: str, least: float, most: float, *, above: bool = False) -> float | None:
        """A number within bounds; with `above`, `least` is not one of them."""
        value = self.get(key)
        if value is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not least <= value <= most or (above and value == least):
            bounds = f"more than {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
            self.wrong(key, f"is {shown(value)}: expected a number {bounds}")
            return None
        return float(value)

    def choice(self, key: str, choices: Sequence[str], *, required: bool = False) -> str | None:
        """One of some words."""
        value = self.text(key, required=required)
        if value is not None and value not in choices:
            self.wrong(key, f"is {shown(value)}: expected {' or '.join(map(repr, choices))}")
            return None
        return value

    def inner(self, key: str, *, required: bool = False) -> Fields | None:
        """An object in this one."""
        value = self._typed(key, dict, "an object", required)
        return None if value is None else Fields(value, self.problems, self.name(key))

    def mapping(self, key: str, *, required: bool = False) -> dict[str, Any] | None:
        """An object whose keys are the asker's own."""
        value: dict[str, Any] | None = self._typed(key, dict, "an object", required)
        return value

    def inners(self, key: str, *, required: bool = False) -> list[Fields]:
        """A list of objects."""
        value = self._typed(key, list, "a list", required) or []
        return [found for at, each in enumerate(value) if (found := self._item(key, at, each)) is not None]

    def neutral(self, key: str, *allowed: Any, why: str) -> None:
        """A field that this server cannot heed: only values that change nothing are taken."""
        value = self.get(key)
        if value is not None and not any(_same(value, each) for each in allowed):
            self.wrong(key, f"is {shown(value)}, which is not supported: {why}")

    def ignored(self, *keys: str) -> None:
        """Fields that have no effect on an answer."""
        self._read.extend(keys)

    def close(self) -> None:
        """What nobody has read is no field; the nearest one is named."""
        for key in self._given:
            if self.problems.full:
                return
            if key not in self._read:
                near = difflib.get_close_matches(cut(key), self._read, n=1, cutoff=0.6)
                meant = f": did you mean {near[0]!r}?" if near else ""
                self.problems.add(self.name(cut(key)), f"{self.name(cut(key))} is not a parameter{meant}")

    def _typed(self, key: str, wanted: type, said: str, required: bool) -> Any:
        value = self.get(key)
        if value is None:
            if required:
                self.wrong(key, f"is missing: expected {said}")
            return None
        if not isinstance(value, wanted):
            self.wrong(key, f"is {kind(value)}: expected {said}")
            return None
        return value

    def _item(self, key: str, at: int, value: Any) -> Fields | None:
        if isinstance(value, dict):
            return Fields(value, self.problems, f"{self.name(key)}[{at}]")
        self.wrong(f"{key}[{at}]", f"is {kind(value)}: expected an object")
        return None


def kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    return cut(json.dumps(value, ensure_ascii=False))


def cut(text: str) -> str:
    """A text, shortened."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _deeper_than(value: Any, levels: int) -> bool:
    here: list[Any] = [value]
    for _ in range(levels):
        here = [inner for each in here for inner in _inside(each)]
    return bool(here)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
