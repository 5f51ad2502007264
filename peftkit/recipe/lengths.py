"""How long the rows of a run are: what its plan needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftkit.base.head import Head
from peftkit.data.chat import IGNORED, Example
from peftkit.data.encoded import lengths, longest
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.data.tasks.heads import kind_of
from peftkit.data.tasks.spec import TaskSpec
from peftkit.planning.architecture import Architecture, TaskHead
from peftkit.recipe.groups import Groups

_ASSUMED = 1024
"""Longest row of a plan that is made before there are rows, where no setting says."""
_OUTPUTS = 2
"""Labels of a task of which no row is known yet: a head of a thousand would be no more than a small adapter."""


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
    task: TaskHead | None = None
    """The head that the rows of a task ask for."""

    @classmethod
    def assumed(cls, data: Any) -> Lengths:
        """Rows that are all as long as these settings of data allow; both answers of a pair are one row."""
        limit = data.max_length or _ASSUMED
        longest = 2 * limit if isinstance(data, PreferenceSpec) and data.kind == "pairs" else limit
        written = not isinstance(data, TaskSpec) or data.task in ("translation", "summarization")
        task = None if written else TaskHead(kind_of(data)[0], _OUTPUTS)
        return cls(longest, longest, limit, float(longest), None, 0, 0.0, task)

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

    @classmethod
    def of_run(cls, data: Any, given: Groups, head: Head | None) -> Lengths:
        """Those of the rows that an audit found; `head` is the task's. Held-out answers of a pair are read apart."""
        train, held_out = data.train.examples, data.held_out.examples
        if isinstance(given.data, PreferenceSpec):
            held_out = [each for example in held_out for each in example.sequences]
        found = cls.of(train, held_out, given.train.rows_per_step)
        if head is None:
            return found
        outputs = 2 if head.kind == "span" else len(head.labels)
        return replace(found, labelled=found.longest, task=TaskHead(head.kind, outputs))

    def headed(self, architecture: Architecture) -> Architecture:
        """A base with the head that these rows ask for."""
        return architecture.with_task(self.task) if self.task else architecture

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
