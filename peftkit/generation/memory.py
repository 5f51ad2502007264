"""Memory for the keys and values of running rows: whether one more row fits, and what makes way for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peftkit.errors import GenerationError
from peftkit.generation.lanes import Lane
from peftkit.generation.rows import bytes_per_token
from peftkit.generation.seats import Seat


class CacheMemory:
    """At most `limit` bytes for the rows of all lanes; None is whatever the rows need."""

    def __init__(self, limit: int | None, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._token_bytes: int | None = None

    def make_room(self, lanes: Mapping[Lane, int], seat: Seat) -> bool:
        """Whether one more row, in `seat`, fits into memory; `lanes` says which lane it joins, with how many tokens.

        The room of rows that have left stays for the next ones, who would have to make it anew; it is taken away only
        for a row that does not fit beside it. Raises GenerationError if the row can never fit.
        """
        if self._limit is None:
            return True
        if self._token_bytes is None:
            with seat.model.seated([seat.slot], 1) as model:
                self._token_bytes = bytes_per_token(model, self._device)
        needed = sum(lane.places_with(tokens, shrunk=True) for lane, tokens in lanes.items()) * self._token_bytes
        if needed <= self._limit:
            for lane, tokens in lanes.items():
                if sum(each.places_with(more) for each, more in lanes.items()) * self._token_bytes <= self._limit:
                    break
                lane.shrink(tokens)
            return True
        if not any(lane.rows for lane in lanes):
            raise GenerationError(
                f"{sum(lanes.values())} tokens need {needed} bytes of keys and values",
                expected=f"at most {self._limit}",
                hint="ask for fewer tokens, or give the engine more memory (cache_bytes)",
            )
        return False
