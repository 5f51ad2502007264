"""Buffers that a worker computes in, used again for every piece: new ones would have to be cleared by the kernel."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch


class Workspace(threading.local):
    """The buffers of the thread that asks; what was taken under a name is overwritten by the next taker of it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """An uninitialised contiguous tensor."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(tuple(shape))


WORKSPACE = Workspace()
