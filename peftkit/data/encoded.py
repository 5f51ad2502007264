"""Encoded rows as Arrow columns: in memory or mapped from a file, and made into examples one at a time.

An `Example` takes some 16 bytes a token as lists of Python integers; a column takes 4 for its id and 4 for its label.
Lengths and counts are columns of their own, so that nobody has to build 100,000 examples to know how long they are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from peftkit.data.chat import Example

FILE = "rows.arrow"
_BATCH = 4096
"""Rows of an Arrow batch; all batches but the last have as many, so that a row is found by division."""
MANY = 200_000
"""Tokens from which rows become columns: encoding fewer takes less than half a second, so they are not kept either."""
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("answer_start", pa.int32()),
        ("row", pa.int64()),
        # As bytes: a file name that is not UTF-8 has lone surrogates, which an Arrow string refuses.
        ("where", pa.binary()),
        ("stop_added", pa.uint8()),
        ("answer_tokens", pa.int32()),
    ]
)
Ints = np.ndarray[Any, np.dtype[Any]]


class EncodedRows(Sequence[Example]):
    """Examples that are built when they are asked for; a slice is a tuple of them."""

    def __init__(self, table: pa.Table) -> None:
        """Read a table of `_SCHEMA`, none of whose batches is copied. Raises ValueError for any other."""
        if table.schema != _SCHEMA:
            raise ValueError("the columns are not those of encoded rows")
        self.table = table
        self._batches = [_Batch(batch) for batch in table.to_batches()]
        if any(batch.rows != _BATCH for batch in self._batches[:-1]):
            raise ValueError(f"a batch has not {_BATCH} rows")

    @classmethod
    def mapped(cls, folder: Path) -> EncodedRows:
        """Those that `write` put into a folder, mapped; raises ValueError or OSError when they are not such."""
        return cls(pa.ipc.open_file(pa.memory_map(str(folder / FILE), "r")).read_all())

    def write(self, folder: Path) -> None:
        """Put the rows into a folder, as the file `FILE`."""
        with open(folder / FILE, "xb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            writer.write_table(self.table)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, at: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(at, slice):
            return tuple(self[index] for index in range(*at.indices(len(self))))
        index = range(len(self))[at]
        return self._batches[index // _BATCH].example(index % _BATCH)

    def __iter__(self) -> Iterator[Example]:
        return (batch.example(at) for batch in self._batches for at in range(batch.rows))

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row."""
        return _joined(np.diff(batch.offsets) for batch in self._batches)

    @cached_property
    def answer_tokens(self) -> Ints:
        """Tokens of each row that the loss falls on."""
        return _joined(batch.answer_tokens for batch in self._batches)

    @cached_property
    def stop_added(self) -> Ints:
        """Which rows got an end-of-turn token that their template did not write."""
        return _joined(batch.stop_added for batch in self._batches).astype(bool)

    def of(self, rows: int) -> bool:
        """Whether each example was made of one of so many rows."""
        made_of = [batch.row for batch in self._batches if batch.rows]
        return all(int(each.min()) >= 0 and int(each.max()) < rows for each in made_of)

    @cached_property
    def sha256(self) -> str:
        """Digest over the length, token ids and labels of all rows as 64-bit integers, in their order."""
        digest = hashlib.sha256()
        for batch in self._batches:
            digest.update(batch.flat().tobytes())
        return digest.hexdigest()


class _Batch:
    """The columns of one Arrow batch as arrays that share its memory."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, labels = batch.column("input_ids"), batch.column("labels")
        self.rows = batch.num_rows
        self.offsets: Ints = ids.offsets.to_numpy()
        self.ids: Ints = ids.values.to_numpy()
        self.labels: Ints = labels.values.to_numpy()
        if not np.array_equal(self.offsets, labels.offsets.to_numpy()):
            raise ValueError("a row has more ids than labels, or fewer")
        numbers = ("answer_start", "row", "stop_added", "answer_tokens")
        self.answer_start, self.row, self.stop_added, self.answer_tokens = (
            batch.column(name).to_numpy() for name in numbers
        )
        self.where = batch.column("where")

    def example(self, at: int) -> Example:
        """One row."""
        cut = slice(self.offsets[at], self.offsets[at + 1])
        ids, labels, start = self.ids[cut].tolist(), self.labels[cut].tolist(), int(self.answer_start[at])
        where = self.where[at].as_py().decode("utf-8", "surrogatepass")
        return Example(ids, labels, start, int(self.row[at]), where, bool(self.stop_added[at]))

    def flat(self) -> Ints:
        """Length, ids and labels of each row, one after another."""
        lengths = np.diff(self.offsets)
        flat = np.empty(self.rows + 2 * len(self.ids), np.int64)
        starts = np.arange(self.rows) + 2 * self.offsets[:-1].astype(np.int64)
        flat[starts] = lengths
        # A row's ids follow its length, and its labels its ids.
        within = np.arange(len(self.ids)) + np.repeat(starts + 1 - self.offsets[:-1], lengths)
        flat[within] = self.ids
        flat[within + np.repeat(lengths, lengths)] = self.labels
        return flat


class Gathering:
    """Takes encoded rows one by one: few are given back as they are, many as columns."""

    def __init__(self, many: int = MANY) -> None:
        self.many = many
        self._held: list[Example] = []
        self._tokens = 0
        self._batches: list[pa.RecordBatch] = []

    def add(self, example: Example) -> None:
        """Take one more row."""
        self._held.append(example)
        self._tokens += len(example.input_ids)
        if self._tokens > self.many:
            while len(self._held) >= _BATCH:
                self._batches.append(_batch(self._held[:_BATCH]))
                del self._held[:_BATCH]

    def done(self) -> Sequence[Example]:
        """All rows, in the order in which they were taken."""
        if self._tokens <= self.many:
            return tuple(self._held)
        last = [_batch(self._held)] if self._held else []
        return EncodedRows(pa.Table.from_batches([*self._batches, *last], _SCHEMA))


def lengths(examples: Sequence[Any]) -> Ints:
    """Tokens of each row."""
    return _column(examples, "lengths", lambda example: len(example.input_ids))


def answer_tokens(examples: Sequence[Any]) -> Ints:
    """Tokens of each row that the loss falls on."""
    return _column(examples, "answer_tokens", lambda example: example.answer_tokens)


def stop_added(examples: Sequence[Example]) -> Ints:
    """Which rows got an end-of-turn token that their template did not write."""
    return _column(examples, "stop_added", lambda example: example.stop_added)


def longest(examples: Sequence[Example], count: int) -> list[Example]:
    """The `count` rows with most tokens, the longest first; of equally long ones the first."""
    order = np.argsort(-lengths(examples), kind="stable")[:count]
    return [examples[int(index)] for index in order]


def _column(examples: Sequence[Any], name: str, of: Callable[[Any], int]) -> Ints:
    if isinstance(examples, EncodedRows):
        found: Ints = getattr(examples, name)
        return found
    return np.fromiter(map(of, examples), np.int64, len(examples))


def _joined(parts: Iterable[Ints]) -> Ints:
    whole: Ints = np.concatenate([np.empty(0, np.int64), *parts])
    whole.flags.writeable = False
    return whole


def _batch(examples: Sequence[Example]) -> pa.RecordBatch:
    lengths = [len(example.input_ids) for example in examples]
    if odd := [example.where for example in examples if len(example.labels) != len(example.input_ids)]:
        raise ValueError(f"{odd[0]}: as many labels as ids are needed")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())  # raises above 2**31 tokens in a batch
    columns: Mapping[str, Any] = {
        "input_ids": _lists(offsets, (example.input_ids for example in examples)),
        "labels": _lists(offsets, (example.labels for example in examples)),
        "answer_start": [example.answer_start for example in examples],
        "row": [example.row for example in examples],
        "where": [example.where.encode("utf-8", "surrogatepass") for example in examples],
        "stop_added": [int(example.stop_added) for example in examples],
        "answer_tokens": [example.answer_tokens for example in examples],
    }
    return pa.RecordBatch.from_pydict(dict(columns), schema=_SCHEMA)


def _lists(offsets: Any, lists: Iterable[list[int]]) -> Any:
    values = array("i", chain.from_iterable(lists))
    return pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(values, np.int32)))
