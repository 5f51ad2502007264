"""What a sweep looks through: `learning_rate=1e-5..1e-3 r=4,8 train.seed=1` as ranges, choices and fixed settings."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftkit.base.ref import BaseSpec
from peftkit.config.hints import Slot, find_slots, is_mapping

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?::(?P<scale>\w+))?")
_WIDE = 10
"""A range whose ends differ by this factor is searched by its logarithm."""
_DIGITS = 4
"""Significant digits of a value inside a range: what a person would type, and far finer than a figure can tell."""
_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Choices:
    """A setting that takes one of several values, written as on the command line."""

    key: str
    texts: tuple[str, ...]

    @property
    def tried_first(self) -> tuple[str, ...]:
        """Values that stand for all when settings are checked."""
        return self.texts

    @property
    def middle(self) -> str:
        """The middle one in the order given."""
        return self.texts[(len(self.texts) - 1) // 2]

    def holds(self, text: str) -> bool:
        """Whether a value is one of them."""
        return text in self.texts

    def __str__(self) -> str:
        return ", ".join(self.texts)


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included; `log` searches it by its logarithm, `whole` takes integers alone."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    @property
    def tried_first(self) -> tuple[str, ...]:
        """Values that stand for all when settings are checked: the two ends."""
        return self.text(self.low), self.text(self.high)

    @property
    def middle(self) -> str:
        """The mean of the ends, or the geometric mean."""
        return self.text(math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2)

    def value(self, value: float) -> float:
        """A value as it is used: whole, or rounded to a few digits, and never outside the range."""
        if self.whole:
            return int(min(max(round(value), self.low), self.high))
        narrow = self.high - self.low < max(abs(self.low), abs(self.high)) / 50
        return min(max(value if narrow else float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def text(self, value: float) -> str:
        """A value as the command line takes it, to the last bit."""
        return repr(self.value(value))

    def holds(self, text: str) -> bool:
        """Whether a value lies inside."""
        return bool(re.fullmatch(_NUMBER, text)) and self.low <= float(text) <= self.high

    def __str__(self) -> str:
        low, high = (f"{int(end) if self.whole else end:g}" for end in (self.low, self.high))
        return f"{low} to {high}, {'log-uniform' if self.log else 'uniform'}"


Dimension = Choices | Range


@dataclass(frozen=True)
class Space:
    """The settings that are searched, and those that are the same in every trial (`key=value`)."""

    dimensions: tuple[Dimension, ...]
    fixed: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that are searched."""
        return tuple(dimension.key for dimension in self.dimensions)

    @property
    def size(self) -> float:
        """How many different trials there are; infinity with a range of real numbers."""
        return math.prod(
            len(d.texts) if isinstance(d, Choices) else d.high - d.low + 1 if d.whole else math.inf
            for d in self.dimensions
        )

    def record(self) -> dict[str, Any]:
        """As JSON keeps it; `space_of` reads it."""
        return {"dimensions": [asdict(d) for d in self.dimensions], "fixed": list(self.fixed)}


def space_of(record: Mapping[str, Any]) -> Space:
    """The space that `Space.record` wrote."""
    found: list[Dimension] = []
    for facts in record["dimensions"]:
        found.append(Choices(facts["key"], tuple(facts["texts"])) if "texts" in facts else Range(**facts))
    return Space(tuple(found), tuple(record["fixed"]))


def read_space(config: type[BaseModel], arguments: Sequence[str]) -> tuple[Space, list[str]]:
    """Arguments `key=…` as a space, and everything that is wrong with them.

    A key is a dotted setting or an end of it that fits one setting alone; `bases` is the source of the base. `a,b` are
    choices (in quotes or brackets a comma is part of the value), `lo..hi` is a range, by its logarithm where both ends
    are positive and differ tenfold, or as `:log` and `:linear` say; anything else is fixed.
    """
    slots = find_slots(config)
    dimensions: list[Dimension] = []
    fixed: list[str] = []
    problems: list[str] = []
    seen: set[str] = set()
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.strip():
            problems.append(f"{argument!r}: a setting is written key=value, key=a,b or key=low..high")
            continue
        try:
            key = _base_key(slots) if name == "bases" else find_key(name.strip(), slots)
            if key in seen:
                raise ValueError(f"{key}: given twice")
            seen.add(key)
            found = _read(key, text, slots.get(key))
        except ValueError as error:
            problems.append(str(error))
            continue
        if isinstance(found, str):
            fixed.append(f"{key}={found}")
        else:
            dimensions.append(found)
    return Space(tuple(dimensions), tuple(fixed)), problems


def find_key(name: str, slots: Mapping[str, Slot]) -> str:
    """The dotted setting that a name means. Raises ValueError for an unknown or ambiguous one, with the near ones."""
    slot = slots.get(name)
    if slot is not None and slot.group is None:
        return name
    if slot is not None:
        word = getattr(slot.group, "shorthand", "")
        if word:
            return f"{name}.{word}"
        raise ValueError(f"{name}: a group of settings; name one of them, such as {_inside(name, slots)}")
    if any(owner in slots and any(map(is_mapping, slots[owner].alternatives)) for owner in _owners(name)):
        return name
    leaves = [key for key, known in slots.items() if known.group is None]
    ends = [key for key in leaves if key.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ValueError(f"{name}: may be {', '.join(ends[:-1])} or {ends[-1]}; write it whole")
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, leaves, n=2, cutoff=0.7)
    names = difflib.get_close_matches(last, {key.rpartition(".")[2] for key in leaves}, n=2, cutoff=0.6)
    near = list(dict.fromkeys([*close, *(key for key in leaves if key.rpartition(".")[2] in names)]))[:4]
    raise ValueError(f"{name}: unknown setting{f'; did you mean {_either(near)}?' if near else ''}")


def _base_key(slots: Mapping[str, Slot]) -> str:
    for key, slot in slots.items():
        if slot.group is BaseSpec:
            return f"{key}.source"
    raise ValueError("bases: this recipe has no base among its settings")


def _owners(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _inside(group: str, slots: Mapping[str, Slot]) -> str:
    return _either([key for key in slots if key.startswith(f"{group}.")][:3])


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)


def _read(key: str, text: str, slot: Slot | None) -> Dimension | str:
    """One argument's value: a range, choices, or the text of a fixed value. Raises ValueError for what is none."""
    if bounds := _RANGE.fullmatch(text.strip()):
        return _range(key, bounds, slot)
    kinds = slot.alternatives if slot else ()
    if any(kind is str for kind in kinds) and Path(text).exists():  # a file whose name holds a comma
        return text
    parts = [part.strip() for part in _split(text)]
    if len(parts) == 1:
        return text
    if "" in parts:
        raise ValueError(f"{key}: an empty value stands among the choices {text!r}")
    if twice := [part for part in dict.fromkeys(parts) if parts.count(part) > 1]:
        raise ValueError(f"{key}: {', '.join(twice)} stands twice among the choices {text!r}")
    return Choices(key, tuple(_unquoted(part) for part in parts))


def _range(key: str, bounds: re.Match[str], slot: Slot | None) -> Range:
    low, high, scale = float(bounds["low"]), float(bounds["high"]), bounds["scale"]
    kinds = slot.alternatives if slot else (float,)
    if not any(kind in (int, float) for kind in kinds):
        raise ValueError(f"{key}: takes no numbers, so {bounds[0]} is no range of it; list its values, as a,b")
    whole = float not in kinds
    if whole and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{key}: takes whole numbers, and {bounds[0]} has other ends")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{key}: {bounds[0]} is no range: the first end must be below the second")
    if scale not in (None, "log", "linear"):
        raise ValueError(f"{key}: {bounds[0]} ends in :{scale}; a range may end in :log or :linear")
    if scale == "log" and low <= 0:
        raise ValueError(f"{key}: {bounds[0]} has no logarithm: both ends must be above 0")
    log = scale == "log" or (scale is None and low > 0 and high / low >= _WIDE * (1 - 1e-12))
    return Range(key, low, high, log, whole)


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in _OPENING) - (char in _CLOSING)
        if char == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    # An apostrophe or a bracket that is never closed is part of a text, not a rule about commas.
    return text.split(",") if quote or depth > 0 else parts


def _unquoted(part: str) -> str:
    return part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "\"'" else part
