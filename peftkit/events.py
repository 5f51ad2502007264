"""What the library reports while it works; the CLI (or a test) decides how it looks.

The library never prints. Functions that take long or decide something accept a `report: Report` and call it with one of
the events below. `silent` swallows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all events; `as_record` is what `events.jsonl` of a run stores."""

    def as_record(self) -> dict[str, Any]:
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Decision(Event):
    """A choice that peftkit made, with its reason: "compute dtype", "bfloat16", "SM 8.9"."""

    what: str
    choice: str
    reason: str


@dataclass(frozen=True)
class Note(Event):
    """A fact worth one line."""

    text: str


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know, counted and explained; the run goes on."""

    text: str
    hint: str | None = None


@dataclass(frozen=True)
class Phase(Event):
    """A stage of a run begins; `total` is its number of units, None when unknown."""

    name: str
    total: int | None = None
    unit: str = "steps"


@dataclass(frozen=True)
class Progress(Event):
    """`done` units of the current phase are finished; `figures` are the numbers to show beside the bar."""

    done: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Measured(Event):
    """A figure that was measured on the held-out rows after so many steps."""

    step: int
    name: str
    value: float


@dataclass(frozen=True)
class Table(Event):
    """Rows to show as a table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A `Report` that drops everything."""
