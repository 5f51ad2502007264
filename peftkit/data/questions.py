"""Rows that wait for an answer: the formats of training, with the last answer taken away or never there.

A file of JSON lines is read line by line, twice, so that its length does not matter; the others are read whole.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.data.formats import LISTED, SHAPES, Row, Shape, _Reading
from peftkit.data.json_records import parse_json
from peftkit.data.readers import Found, Where, read
from peftkit.data.turns import Turns, show
from peftkit.errors import DataError

_ASKED = tuple(shape for shape in SHAPES if shape.format != "text")
_STAND_IN = {"role": "assistant", "content": "?"}
_SPLIT = "split the file: all its rows are read as the first one is"
_EXPECTED = "a question: instruction, prompt, question, messages or conversations"


@dataclass(frozen=True)
class Questions:
    """The rows of one file, looked through; iterating reads them again."""

    path: Path
    shape: Shape
    count: int
    sha256: str
    """Of the file's bytes."""
    names: Mapping[str | None, Where]
    """Who is asked, as the rows name them, and where first; None is the base."""
    left_out: tuple[str, ...] = ()
    """Columns that are no part of the question."""
    column: str | None = None
    """The one that names who is asked."""

    def __iter__(self) -> Iterator[tuple[Row, str | None]]:
        """Every row, ending with a stand-in for its answer, and whom it asks.

        Raises DataError when the file was changed so that other rows are met than were looked through.
        """
        reading = _Asking(self.shape)
        for where, record in _records(self.path):
            name = _named(where, record, self.column)
            row = reading.row(where, record)
            if reading.problems or name not in self.names or where.index >= self.count:
                raise self.changed()
            yield row, name

    def changed(self) -> DataError:
        """What to raise when the file is not what it was."""
        return DataError(f"{self.path} was changed while it was answered", expected="the same rows to the end")


def look_through(source: str | Path, column: str | None = None) -> Questions:
    """Read a file of questions to its end. `column` names, in each row, who is asked; empty is the base.

    Raises DataError for what is wrong with the file or with any row, before anything is asked.
    """
    path = Path(source).expanduser()
    digest = durable.digest_file(path) if path.is_file() else ""
    shape: Shape | None = None
    reading, count, bad, problems = _Asking(_ASKED[0]), 0, 0, list[str]()
    names, left_out = dict[str | None, Where](), dict[str, None]()
    for where, record in _records(path):
        names.setdefault(_named(where, record, column), where)
        shape = shape or _shape_of(where, record)
        if not count:
            reading = _Asking(shape)
        left_out |= dict.fromkeys(reading.row(where, record).columns)
        count += 1
        bad += bool(reading.problems)
        problems += [str(problem) for problem in reading.problems if len(problems) < LISTED]
        reading.problems.clear()
    if shape is None:
        read(path)
        raise DataError(f"{path}: holds no rows", expected="at least one row")
    if bad:
        listed = "".join(f"\n- {problem}" for problem in problems[:LISTED])
        fact = f"{path}: {bad:,} of {count:,} rows cannot be asked, read as {shape.format}{listed}"
        raise DataError(fact, expected=_EXPECTED, hint="edit or remove these rows; peftkit drops none by itself")
    return Questions(path, shape, count, digest, names, tuple(left_out), column)


class _Asking(_Reading):
    """Reads rows whose answer may be missing; what stands in its place is not looked at."""

    def row(self, where: Where, record: dict[str, Any]) -> Row:
        question, *answers = self.shape.needs
        if question not in record:
            self.where = where
            columns = ", ".join(map(repr, list(record)[:12])) or "none"
            self.wrong(question, f"no such column, only {columns}", "the columns of the first row", _SPLIT)
            return Row((), "", None, {}, {}, where)
        stand_in = [_STAND_IN] if isinstance(record.get(question), list) else "?"
        return super().row(where, {**record, **dict.fromkeys(answers, stand_in)})

    def sequence(self, turns: Turns) -> None:
        if turns and turns[-1][1]["role"] == "assistant":
            turns.pop()
        if not turns or turns[-1][1]["role"] == "system":
            self.wrong(turns[-1][0] if turns else self.shape.needs[0], "nobody asks anything", "a user's turn")
        turns.append(("answer", dict(_STAND_IN)))
        super().sequence(turns)


def _shape_of(where: Where, record: dict[str, Any]) -> Shape:
    """What a file's first row is read as, and with it all of them."""
    given = {key for key, value in record.items() if value is not None}
    fitting = [shape for shape in _ASKED if shape.needs[0] in given and _complete(shape, given, record)]
    asked = list(dict.fromkeys(shape.needs[0] for shape in fitting))
    if len(asked) == 1:
        return fitting[0]
    columns = ", ".join(map(repr, list(record)[:12])) or "none"
    if asked:
        hint = f"keep one of the columns {', '.join(asked)}"
        raise DataError(f"{where}: it is unclear which column is the question; columns: {columns}", hint=hint)
    hint = "rename the column that holds the question to 'prompt'"
    raise DataError(
        f"{where}: no column is known to be the question; columns: {columns}", expected=_EXPECTED, hint=hint
    )


def _complete(shape: Shape, given: set[str], record: dict[str, Any]) -> bool:
    """Whether nothing else in a row may be part of the question: a shape with another answer is told by that."""
    others = {other.needs[-1] for other in _ASKED if other.needs[0] == shape.needs[0]} - {*shape.needs}
    filled = {**record, **dict.fromkeys(shape.needs)}
    return not given & others and shape.fits(filled, nulls=True)


def _named(where: Where, record: dict[str, Any], column: str | None) -> str | None:
    """Take the name of who is asked out of a row."""
    if column is None:
        return None
    if column not in record:
        columns = ", ".join(map(repr, list(record)[:12])) or "none"
        raise DataError(f"{where}: no column {column!r}; columns: {columns}", expected="an adapter's name, or nothing")
    name = record.pop(column)
    if name is not None and not isinstance(name, str):
        raise DataError(f"{where}: {column}: found {show(name)}", expected="an adapter's name, or nothing")
    return name or None


def _records(path: Path) -> Found:
    """The records of a file, those of JSON lines one at a time. Raises DataError when it cannot be read to its end."""
    endings = [suffix.lower() for suffix in path.suffixes]
    zipped = endings[-1:] == [".gz"]
    if endings[-1 - zipped : len(endings) - zipped] != [".jsonl"] or not path.is_file():
        yield from read(path).records
        return
    lines = _lines(path, gzip.open if zipped else open)
    while True:
        try:
            where, record = next(lines)
        except StopIteration:
            return
        except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
            read(path)  # says where, and what else is wrong
            raise DataError(f"{path}: cannot be read: {error}") from error
        yield where, record


def _lines(path: Path, opened: Any) -> Found:
    index = 0
    with opened(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip(" \t\r\n"):
                continue
            record = parse_json(text)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} holds no object")
            yield Where(path.name, number, index), record
            index += 1
