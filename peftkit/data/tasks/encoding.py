"""What encoding gathers while it goes through the rows, and what it does with long ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peftkit.data.tasks.task import TaskExample


@dataclass(frozen=True)
class Policy:
    """What happens to rows above `length` tokens; None is no limit."""

    length: int | None
    too_long: Literal["raise", "drop", "truncate", "windows"]
    stride: int

    def over(self, tokens: int) -> bool:
        """Whether so many tokens are too many."""
        return self.length is not None and tokens > self.length


@dataclass
class Encoding:
    """Sequences, and places of rows that did not come through whole; dicts, as a place is listed once."""

    examples: list[TaskExample] = field(default_factory=list)
    dropped: dict[str, None] = field(default_factory=dict)
    truncated: dict[str, None] = field(default_factory=dict)
    too_long: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)

    def refused(self, where: str, tokens: int, policy: Policy) -> bool:
        """Whether a row is left out for its length; if so it is noted as the policy says."""
        if not policy.over(tokens) or policy.too_long in ("truncate", "windows"):
            return False
        if policy.too_long == "raise":
            self.too_long[where] = tokens
        else:
            self.dropped[where] = None
        return True
