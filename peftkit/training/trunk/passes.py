"""Which batches fill the cache, and where in it each row's states are.

A state depends on the shape of the batch that it was computed in by rounding (1e-7 to 1e-6 in float32), so the cache is
filled in the batches in which an uncached run that pads its rows shows each for the first time: its first epoch is then
bitwise the same. Rows with the same ids share the states of the first of them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.data.chat import Example
from peftkit.generation.forward import Labelled
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import lengths, split
from peftkit.training.schedule import Schedule


@dataclass(frozen=True)
class Pass:
    """One batch through the trunk."""

    rows: tuple[Labelled, ...]
    training: bool
    """Whether the model is in training mode, as it is when the uncached run shows these rows."""

    @property
    def halves(self) -> tuple[Pass, Pass]:
        """The same rows in two batches; the first is never the smaller one."""
        middle = (len(self.rows) + 1) // 2
        return Pass(self.rows[:middle], self.training), Pass(self.rows[middle:], self.training)


def training_passes(examples: Sequence[Example], plan: Schedule, tokens_at_once: int) -> list[Pass]:
    """The micro-batches of a run that show a row for the first time, as `training.step` splits its steps."""
    seen: set[int] = set()
    found = []
    for step in plan.steps:
        rows = [examples[index] for index in step]
        for batch in split(lengths(rows), tokens_at_once, flat=False):
            if not seen.issuperset(step[at] for at in batch):
                found.append(Pass(tuple(rows[at] for at in batch), training=True))
                seen.update(step[at] for at in batch)
    return found


def measuring_passes(held_out: Sequence[Example], model: Any, batch_size: int, paths: Paths) -> list[Pass]:
    """The batches in which held-out rows are measured."""
    batches = paths.measured_together(model, held_out, batch_size)
    return [Pass(tuple(held_out[at] for at in batch), training=False) for batch in batches]


def row_key(ids: bytes, types: bytes = b"") -> bytes:
    """What a row is found by: a 128-bit digest of its token ids, given as int64 in memory order, and of their types."""
    return hashlib.blake2b(ids + types, digest_size=16).digest()


def _key_of(row: Labelled) -> bytes:
    types = getattr(row, "type_ids", None) or ()
    return row_key(array("q", row.input_ids).tobytes(), array("q", types).tobytes())


class Index:
    """Where each row's states begin, in positions; rows follow one another in the order of the passes."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.starts: dict[bytes, int] = {}
        self.positions = 0
        self.passes: list[tuple[Pass, list[int]]] = []
        """The passes that show new rows, and which of their rows these are."""
        for one in passes:
            new = [at for at, row in enumerate(one.rows) if self._add(row)]
            if new:
                self.passes.append((one, new))

    def _add(self, row: Labelled) -> bool:
        key = _key_of(row)
        if key in self.starts:
            return False
        self.starts[key] = self.positions
        self.positions += len(row.input_ids)
        return True

    def digest(self) -> str:
        """SHA-256 over the passes: token ids, their order, and the batches that they are computed in."""
        digest = hashlib.sha256()
        for one, _ in self.passes:
            digest.update(array("q", [len(one.rows), one.training]).tobytes())
            for row in one.rows:
                digest.update(array("q", [len(row.input_ids), *row.input_ids]).tobytes())
                digest.update(_key_of(row))
        return digest.hexdigest()
