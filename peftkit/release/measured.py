"""What could be measured, and the reason where something could not: a missing figure is never taken for a good one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peftkit.evaluation.compare import Interval

LEAST_TOKENS = 1_000
"""Answer tokens below which nothing is concluded from a likelihood."""


@dataclass(frozen=True)
class NotMeasured:
    """Why there is no figure; `hint` is the command or edit that would give one."""

    why: str
    hint: str | None = None

    @property
    def reason(self) -> str:
        """As receipts say it."""
        return f"not measured: {self.why}"

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        return {"measured": False, "reason": self.reason}


def too_few(answer_tokens: int, least: int = LEAST_TOKENS) -> NotMeasured | None:
    """The reason not to conclude anything from so few answer tokens; None where they suffice."""
    if answer_tokens >= least:
        return None
    return NotMeasured(f"{answer_tokens:,} answer tokens, at least {least:,} are needed", "name a file with more rows")


def interval_record(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON; ends that are infinite become null."""
    ends = (interval.point, interval.low, interval.high)
    return {name: end if math.isfinite(end) else None for name, end in zip(("point", "low", "high"), ends, strict=True)}
