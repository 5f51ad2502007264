"""The best span of a window: a start and an end among the tokens of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Found:
    """First and last token of a span, and the sum of their scores."""

    first: int
    last: int
    score: float


def best_span(scores: Array, offsets: Sequence[tuple[int, int]], most: int) -> Found | None:
    """The span of 1 to `most` tokens with the highest start + end score; None in a window without context tokens.

    `scores` are [tokens, 2] in float64. Tokens with empty offsets neither begin nor end a span. Of equal spans the
    shortest is taken, and of these the first.
    """
    inside = np.array([start < end for start, end in offsets], dtype=bool)
    starts = np.where(inside, scores[:, 0], -np.inf)
    ends = np.where(inside, scores[:, 1], -np.inf)
    best: Found | None = None
    for more in range(min(most, len(inside))):
        sums = starts[: len(starts) - more] + ends[more:]
        first = int(sums.argmax())
        if np.isfinite(sums[first]) and (best is None or sums[first] > best.score):
            best = Found(first, first + more, float(sums[first]))
    return best
