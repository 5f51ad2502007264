"""How much an engine may take, and how long a row may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.errors import EngineBusy


@dataclass(frozen=True)
class Limits:
    """What an engine may take."""

    rows: int = 16
    """Requests that are answered at once."""
    waiting: int | None = None
    """Requests that may wait beside those that have a row, or get one at the next step; None is any number."""
    prompt_tokens: int = 2048
    """Tokens of prompts read in one pass, so that a long prompt does not hold up the answers on their way."""
    cache_bytes: int | None = None
    """Memory for the keys and values of running rows; None is whatever the rows need."""
    prefix_bytes: int = 64 << 20
    """Memory for the keys and values of prompts that were read, for prompts that begin alike."""

    def check_room(self, running: int, waiting: int) -> None:
        """Raise EngineBusy when one more request would be one too many."""
        if self.waiting is not None and running + waiting >= self.rows + self.waiting:
            raise EngineBusy(
                f"{running} requests are answered and {waiting} wait",
                expected=f"fewer than {self.rows + self.waiting} in all",
                hint="try again when some have been answered",
            )


def positions_of(model: Any) -> int | None:
    """The most tokens that a row of this model may have; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
