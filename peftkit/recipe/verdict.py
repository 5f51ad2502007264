"""One line of an examination: what was measured, what it was held against, and how it went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "failed", "shown", "left out"]


@dataclass(frozen=True)
class Check:
    """A figure and its verdict; `shown` has no bound that could fail it."""

    what: str
    """The figure: `gradients`, `step`, `weights`."""
    of: str
    """What it is a figure of: `nf4+dq, bfloat16, 4 × 256 tokens`."""
    measured: float | None
    unit: str
    state: State
    expected: float | None = None
    """What was predicted."""
    low: float | None = None
    high: float | None = None
    """Bounds, both included."""
    source: str = ""
    """Where the bounds come from, or why it was left out."""
    hint: str | None = None
    """What to do when it failed."""

    @property
    def name(self) -> str:
        """Figure and subject in one."""
        return f"{self.what}, {self.of}"


def held(
    what: str,
    of: str,
    measured: float,
    unit: str,
    *,
    low: float | None = None,
    high: float | None = None,
    expected: float | None = None,
    source: str,
    hint: str | None = None,
) -> Check:
    """Hold a figure to its bounds; a NaN fails."""
    passed = (low is None or measured >= low) and (high is None or measured <= high)
    return Check(what, of, measured, unit, "ok" if passed else "failed", expected, low, high, source, hint)


def shown(what: str, of: str, measured: float, unit: str, expected: float | None = None, source: str = "") -> Check:
    """A figure to keep, which nothing can fail."""
    return Check(what, of, measured, unit, "shown", expected, source=source)


def left_out(what: str, of: str, why: str) -> Check:
    """A check that was not made."""
    return Check(what, of, None, "", "left out", source=why)


def failed(checks: Iterable[Check]) -> list[Check]:
    """The checks that failed."""
    return [check for check in checks if check.state == "failed"]
