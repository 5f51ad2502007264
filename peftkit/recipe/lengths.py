"""How long the rows of a run are: what its plan needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftkit.data.chat import IGNORED, Example
from peftkit.data.encoded import lengths, longest

_ASSUMED = 1024
"""Longest row of a plan that is made before there are rows, where no setting says."""


@dataclass(frozen=True)
class Lengths:
    """What a plan needs to know of the rows."""

    longest: int
    labelled: int
    """Positions at which some of the longest rows has a label."""
    held_out_longest: int
    mean: float
    """Mean tokens of a training row."""
    rows: int | None
    """Training rows; None where there are none yet."""
    held_out_rows: int
    held_out_mean: float

    @classmethod
    def assumed(cls, limit: int | None) -> Lengths:
        """Rows that are all as long as they may be."""
        longest = limit or _ASSUMED
        return cls(longest, longest, longest, float(longest), None, 0, 0.0)

    @classmethod
    def of(cls, train: Sequence[Example], held_out: Sequence[Example], rows_at_once: int) -> Lengths:
        """Those of encoded rows; the head is computed where any of the longest `rows_at_once` has a label."""
        longest_rows = longest(train, rows_at_once)
        labelled = {at for row in longest_rows for at, label in enumerate(row.labels[1:]) if label != IGNORED}
        learned, held = lengths(train), lengths(held_out)
        return cls(
            longest=int(learned.max()),
            labelled=max(1, len(labelled)),
            held_out_longest=int(held.max(initial=1)),
            mean=int(learned.sum()) / len(train),
            rows=len(train),
            held_out_rows=len(held),
            held_out_mean=int(held.sum()) / len(held) if len(held) else 0.0,
        )

    def at_most(self, limit: int) -> Lengths:
        """The same rows, the longer ones cut."""
        return replace(
            self,
            longest=min(self.longest, limit),
            labelled=min(self.labelled, limit),
            held_out_longest=min(self.held_out_longest, limit),
            mean=min(self.mean, limit),
            held_out_mean=min(self.held_out_mean, limit),
        )
