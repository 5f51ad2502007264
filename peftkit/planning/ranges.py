"""Bytes with their doubt, and the parts and stages of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StageName = Literal["load", "train", "evaluate", "save", "merge"]


@dataclass(frozen=True)
class Range:
    """Bytes: at least `low`, probably `expected`, at most `high`."""

    low: int
    expected: int
    high: int

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def or_more(self, other: Range) -> Range:
        """The larger of two needs that are not there at once."""
        return Range(max(self.low, other.low), max(self.expected, other.expected), max(self.high, other.high))


NOTHING = Range(0, 0, 0)


def exactly(count: float) -> Range:
    """A range without doubt."""
    return Range(int(count), int(count), int(count))


@dataclass(frozen=True)
class Part:
    """One thing that takes memory, and how its bytes were counted."""

    name: str
    bytes: Range
    formula: str


@dataclass(frozen=True)
class Stage:
    """The peak of one stage of a run."""

    name: StageName
    bytes: Range
