"""Edited copies of training rows that keep their label, for tasks with few rows.

| task | edits |
|---|---|
| text_classification, regression | `delete`, `swap`, `typo`, `case`; rows of two texts: `typo`, `case` |
| extractive_qa | `typo`, `case`, in the question alone: the context, and so every answer, stays as it is |
| token_classification | `mention`, `swap` of words outside of mentions; tags move with their words |

Other tasks are refused: the target of a translation or summary tells what its source says, and an image's label may
not survive an edit (a hand sign that is mirrored is another one). `delete` and `swap` are two of the four edits of EDA
(Wei & Zou 2019, arXiv 1901.11196); its other two need a thesaurus.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from peftkit.config import Spec
from peftkit.data.edits import Words, case, delete, mentions_by_type, replace_mentions, swap, swap_outside, typo
from peftkit.data.tasks.task import TaskName, TaskRow
from peftkit.errors import ConfigError

EditName = Literal["delete", "swap", "typo", "case", "mention"]
_TRIES = 8
_ALLOWED: dict[TaskName, tuple[EditName, ...]] = {
    "text_classification": ("delete", "swap", "typo", "case"),
    "regression": ("delete", "swap", "typo", "case"),
    "extractive_qa": ("typo", "case"),
    "token_classification": ("mention", "swap"),
}
_TEXT_EDITS = {"delete": delete, "swap": swap, "typo": typo, "case": case}
_OF_PAIRS: tuple[EditName, ...] = ("typo", "case")
"""How two texts relate may hang on any word of either."""


class AugmentSpec(Spec):
    """Edited copies of training rows; off unless `times` is set."""

    times: int = Field(default=0, ge=0, le=16)
    """Copies of every training row, beside the row itself."""
    edits: tuple[EditName, ...] | None = Field(default=None, min_length=1)
    """Each copy is made by one of these, drawn for it; None takes all that the task allows."""
    rate: float = Field(default=0.1, gt=0, le=0.5)
    """Share of a text's words, or of its mentions, that an edit touches; at least one."""
    seed: int = 0
    """Seed of the edits."""


def augment(
    rows: Sequence[TaskRow], spec: AugmentSpec, task: TaskName, *, held_out: Sequence[TaskRow] = ()
) -> tuple[list[TaskRow], dict[str, int]]:
    """The training rows, then their copies, each at its row's `where`; and the counts: rows, copies, not_made.

    A copy is like no row of either side and no other copy; of a row that offers no such edit fewer are made (after 8
    tries each), which `not_made` counts. A row's copies depend on what it says and on the rows of all, not on the order
    of the rows. Raises ConfigError for a task without edits, and for edits that the task does not allow.
    """
    if not spec.times:
        return list(rows), {"rows": len(rows), "copies": 0, "not_made": 0}
    allowed = edits_for(task, spec, paired=task != "extractive_qa" and any(row.pair is not None for row in rows))
    seen = {_content(row) for row in (*rows, *held_out)}
    editor = _Editor(rows, task, spec.rate)
    copies: list[TaskRow] = []
    for row in sorted(rows, key=_content):
        for number in range(spec.times):
            draw = random.Random(repr((spec.seed, number, _content(row))))
            copy = next((one for one in editor.tries(row, allowed, draw) if _content(one) not in seen), None)
            if copy is not None:
                seen.add(_content(copy))
                copies.append(copy)
    copies.sort(key=lambda row: (row.where.file, row.where.index))
    return [*rows, *copies], {
        "rows": len(rows),
        "copies": len(copies),
        "not_made": len(rows) * spec.times - len(copies),
    }


def edits_for(task: TaskName, spec: AugmentSpec, *, paired: bool = False) -> tuple[EditName, ...]:
    """The edits that a task's copies are made by; `paired`: its rows have two texts. Raises as `augment` does."""
    allowed = _ALLOWED.get(task, ())
    if not allowed:
        known = ", ".join(_ALLOWED)
        raise ConfigError(
            [f"data.augment.times={spec.times}: no edit is known to keep the target in {task}"],
            hint=f"remove data.augment; it is for {known}",
        )
    if paired:
        allowed = tuple(edit for edit in allowed if edit in _OF_PAIRS)
    refused = [edit for edit in spec.edits or () if edit not in allowed]
    if refused:
        what = f"{task} of two texts" if paired else task
        raise ConfigError(
            [f"data.augment.edits: {', '.join(refused)} may change the target in {what}"],
            hint=f"data.augment.edits=[{','.join(allowed)}]",
        )
    return spec.edits or allowed


class _Editor:
    """Makes copies of the rows of one task; what the rows have in common is read once."""

    def __init__(self, rows: Sequence[TaskRow], task: TaskName, rate: float) -> None:
        self.task, self.rate = task, rate
        self.words = Words.of((text, row.target) for row in rows for text in (row.text, row.pair or ""))
        tagged = task == "token_classification"
        self.mentions = mentions_by_type((row.words, row.target) for row in rows) if tagged else {}

    def tries(self, row: TaskRow, allowed: Sequence[EditName], draw: random.Random) -> Iterator[TaskRow]:
        """Copies to choose from; some may be the row itself."""
        for _ in range(_TRIES):
            edit = draw.choice(allowed)
            yield self._tagged(row, edit, draw) if self.task == "token_classification" else self._text(row, edit, draw)

    def _tagged(self, row: TaskRow, edit: EditName, draw: random.Random) -> TaskRow:
        tagged = row.words, row.target
        found = (
            replace_mentions(tagged, self.rate, draw, self.mentions)
            if edit == "mention"
            else swap_outside(tagged, self.rate, draw)
        )
        return replace(row, words=found[0], target=found[1])

    def _text(self, row: TaskRow, edit: EditName, draw: random.Random) -> TaskRow:
        make = partial(_TEXT_EDITS[edit], rate=self.rate, draw=draw, words=self.words)
        if self.task == "extractive_qa":
            return replace(row, pair=make(row.pair or ""))
        return replace(row, text=make(row.text), pair=None if row.pair is None else make(row.pair))


def _content(row: TaskRow) -> tuple[str, str, tuple[str, ...]]:
    return row.text, row.pair or "", row.words
