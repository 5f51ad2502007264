"""Whether an engine's device is lost, told by how the answers of its last steps ended."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.generation.answer import stopped
from peftkit.generation.running import Ticket

_IN_A_ROW = 3
"""Steps in which the device's errors, which are RuntimeErrors, ended answers, and none came to its end: it is lost."""


class Faults:
    """What went wrong in a row; used by the engine's thread, and read by any."""

    def __init__(self) -> None:
        self.trouble: str | None = None
        """Why nothing can be answered; None while it can."""
        self._in_a_row = 0

    def raised(self, error: BaseException) -> None:
        """A step raised."""
        self.trouble = str(stopped(error))
        self._in_a_row += 1

    def ended(self, tickets: Sequence[Ticket]) -> None:
        """A step went through, and these answers ended with it."""
        broken = [ticket.error for ticket in tickets if isinstance(ticket.error, RuntimeError)]
        if any(ticket.completion and ticket.completion.finish in ("stop", "length") for ticket in tickets):
            self._in_a_row = 0
        elif broken:
            self._in_a_row += 1
        if self._in_a_row < _IN_A_ROW:
            self.trouble = None
        elif broken:
            self.trouble = str(stopped(broken[0]))
