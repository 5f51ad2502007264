"""Records → rows: which format a file is in, and each record as a conversation (or a plain text) in OpenAI's shape.

| format | columns it reads; besides them `system`, `tools` and `chat_template_kwargs`, but not for `text` |
|---|---|
| `alpaca` | `instruction`, `output`; `input` (joined on a new line below the instruction), `history` (pairs) |
| `sharegpt` | `conversations` of `from` and `value`: human, gpt, system, function_call, tool or observation |
| `messages` | `messages` of `role` and `content` |
| `prompt_completion` | `prompt`, `completion`: two texts or two lists of messages; other names of pairs: see `SHAPES` |
| `text` | `text` |

Every record becomes one row or `load_rows` raises: no row is dropped, no text is trimmed or edited. What is rewritten
is structure only: JSON in a string is parsed where the format nests, text parts of one message are joined without a
separator, a missing content beside tool calls becomes "", null entries of a message (parquet fills them in) go away,
and the arguments of a tool call become an object. Entries of a message that OpenAI does not define stay and are
announced in `Dataset.reason`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data.readers import Records, Where, read
from peftkit.data.turns import OPENAI, SHAREGPT, Problem, TurnReader, Turns, misspelt, show
from peftkit.errors import ConfigError, DataError

LISTED = 20  # problems shown in one message; all are counted
_CHAT = ("system", "tools", "chat_template_kwargs")
_LABELS = {"id", "idx", "index"}  # columns that cannot be part of a question


@dataclass(frozen=True)
class Shape:
    """Columns that make a format; `alone`: only where no further column could be part of the question."""

    format: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = _CHAT
    alone: bool = False

    def reason(self) -> str:
        named = " and ".join(map(repr, self.needs))
        return f"every row has just {named}, read as prompt and completion" if self.alone else f"every row has {named}"

    def fits(self, record: dict[str, Any], nulls: bool) -> bool:
        given = {key for key, value in record.items() if nulls or value is not None}
        if self.format == "text" and given & _NESTED:
            return False  # half a chat row with a text beside it: training on the text alone may not be what is meant
        return given.issuperset(self.needs) and not (self.alone and given - {*self.needs, *self.may} - _LABELS)


SHAPES = (
    Shape("alpaca", ("instruction", "output"), ("input", "history", *_CHAT)),
    Shape("sharegpt", ("conversations",)),
    Shape("messages", ("messages",)),
    Shape("prompt_completion", ("prompt", "completion")),
    Shape("prompt_completion", ("question", "answer"), alone=True),
    Shape("prompt_completion", ("prompt", "response"), alone=True),
    Shape("prompt_completion", ("instruction", "response"), alone=True),
    Shape("text", ("text",), ()),
)
FORMATS = tuple(dict.fromkeys(shape.format for shape in SHAPES))
_NESTED = {key for shape in SHAPES if not shape.alone and shape.format != "text" for key in shape.needs}


@dataclass(frozen=True)
class Row:
    """One row to learn from: a conversation in `messages`, or a plain `text`; never both."""

    messages: tuple[dict[str, Any], ...]
    text: str | None
    tools: tuple[dict[str, Any], ...] | None
    chat_template_kwargs: dict[str, Any]
    columns: dict[str, Any]
    where: Where


@dataclass(frozen=True)
class Dataset:
    """All rows of one source, in its order, and how they were read."""

    rows: tuple[Row, ...]
    format: str
    reason: str
    source: str
    sha256: str
    problems: tuple[Problem, ...] = ()
    """What is wrong with records that became no rows, where that was asked for."""


def load_rows(source: str | Path, format: str = "auto", *, strict: bool = True) -> Dataset:
    """Read a file or Hub set into rows; raises DataError with all problems, ConfigError on an unknown format.

    Unless `strict`, what is wrong with single records is returned with the rows of the others, if there are any.
    """
    return convert(read(source), format, strict=strict)


def convert(records: Records, format: str = "auto", *, strict: bool = True) -> Dataset:
    """Turn records into rows; raises as `load_rows` does."""
    if format not in ("auto", *FORMATS):
        near = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError([f"format: {format!r} is unknown; known: auto, {', '.join(FORMATS)}{meant}"])
    if format == "auto":
        shape, reason = _detect(records)
    else:
        shapes = [shape for shape in SHAPES if shape.format == format]
        held = [shape for shape in shapes if all(record.keys() >= {*shape.needs} for _, record in records.records)]
        shape = (held or shapes)[0]
        reason = f"as asked, from {' and '.join(map(repr, shape.needs))}"
    reading = _Reading(shape)
    rows = tuple(reading.row(where, record) for where, record in records.records)
    if reading.problems:
        bad = {problem.where.index for problem in reading.problems}
        rows = tuple(row for row in rows if row.where.index not in bad)
    if reading.problems and (strict or not rows):
        raise _refusal(reading.problems, records, f"{shape.format} ({reason})")
    others = dict.fromkeys(key for row in rows for key in row.columns)
    kept = f"; other columns are kept beside the rows: {', '.join(map(repr, others))}" if others else ""
    notes = "".join(f"; {note} ({count:,} times)" for note, count in sorted(reading.notes.items()))
    problems = tuple(reading.problems)
    return Dataset(rows, shape.format, reason + kept + notes, records.source, records.sha256, problems)


def _detect(records: Records) -> tuple[Shape, str]:
    found: list[tuple[Shape, ...]] = []
    for _, record in records.records:
        full = tuple(shape for shape in SHAPES if shape.fits(record, nulls=False))
        full = full or tuple(shape for shape in SHAPES if shape.fits(record, nulls=True))
        found.append(full)
    common = [shape for shape in SHAPES if all(shape in shapes for shapes in found)]
    if len(common) == 1:
        return common[0], common[0].reason()
    names = [" and ".join(shape.format for shape in shapes) or "no known format" for shapes in found]
    lines = []
    for name, count in Counter(names).most_common():
        at = names.index(name)
        where, record = records.records[at]
        lines.append(f"- {count:,} rows: {name}, first at {where}" + ("" if found[at] else f"; {_nearest(record)}"))
    hint = "make all rows one format, or split the file"
    if common:
        hint = f"say which: format={' or format='.join(dict.fromkeys(shape.format for shape in common))}"
    elif not any(found):
        hint = "rename the columns to those of a format"
        if records.source.removesuffix(".gz").endswith((".csv", ".tsv")):
            hint += "; if the first line is itself a row, put a header line above it"
    kinds = (
        "of more than one format at once" if common else "of different formats" if any(found) else "in no known format"
    )
    fact = "\n".join([f"{records.source}: rows {kinds}", *lines])
    raise DataError(fact, expected=f"every row {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", hint=hint)


def _nearest(record: dict[str, Any]) -> str:
    """Say which columns a record has, which format they come nearest to, and what that format misses."""

    def near(key: str, shape: Shape) -> str | None:
        free = [column for column in record if column not in (*shape.needs, *shape.may)]
        return next(iter(difflib.get_close_matches(key, free, n=1, cutoff=0.7)), None)

    def score(shape: Shape) -> float:
        return sum(1.0 if key in record else 0.8 if near(key, shape) else 0.0 for key in shape.needs) / len(shape.needs)

    columns = f"columns {', '.join(map(repr, list(record)[:12])) or '(none)'}"
    best = max(SHAPES, key=score)
    if not score(best):
        return columns
    edits = []
    for key in best.needs:
        if key not in record:
            meant = near(key, best)
            edits.append(f"column {meant!r} – did you mean {key!r}?" if meant else f"{key!r} is missing")
    if not edits:
        others = ", ".join(repr(key) for key in record if key not in {*best.needs, *best.may} - _LABELS)
        edits = [f"it is unclear where {others} belong: say format={best.format} to leave them out of the text"]
    return f"{columns}; nearest format: {best.format} ({', '.join(best.needs)}): {'; '.join(edits)}"


def _refusal(problems: list[Problem], records: Records, read_as: str) -> DataError:
    lines = [f"- {problem}" for problem in problems[:LISTED]]
    if len(problems) > LISTED:
        lines.append(f"- and {len(problems) - LISTED:,} more")
    rows, total = len({problem.where.index for problem in problems}), len(records.records)
    many = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    hint = "edit or remove these rows; peftkit drops none by itself"
    if {"chosen", "rejected"} & set(records.records[0][1]):
        hint += ". Columns 'chosen' and 'rejected' make a preference set: answers to compare, not to repeat"
    fact = f"{records.source}: {many} in {rows:,} of {total:,} rows, read as {read_as}"
    return DataError("\n".join([fact, *lines]), expected="rows that can be learnt from whole", hint=hint)


class _Reading(TurnReader):
    """Reads the records of one shape into rows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def row(self, where: Where, record: dict[str, Any]) -> Row:
        self.where = where
        known = (*self.shape.needs, *self.shape.may)
        missing = tuple(key for key in known if key not in record)
        columns = {key: value for key, value in record.items() if key not in known}
        for column in columns:
            if meant := misspelt(column, missing):
                self.wrong(column, f"a column {column!r}", "a column of this format", f"did you mean {meant!r}?")
        lost = [key for key in self.shape.needs if key not in record]
        if lost:
            self.wrong(lost[0], f"no {', '.join(map(repr, lost))}", self.shape.format, _nearest(record))
        if lost or self.shape.format == "text":
            text = "" if lost else self.text(record["text"], "text")
            return Row((), text, None, {}, columns, where)
        turns = self.chat(record)
        if record.get("system") not in (None, ""):
            turns.insert(0, ("system", {"role": "system", "content": self.text(record["system"], "system")}))
        self.sequence(turns)
        tools = self.parsed(record.get("tools"), "tools", list)
        for at, tool in enumerate(tools):
            if not isinstance(tool, dict):
                self.wrong(f"tools[{at}]", show(tool), "an object: the schema of one tool")
        kwargs = self.parsed(record.get("chat_template_kwargs"), "chat_template_kwargs", dict)
        messages = tuple(message for _, message in turns)
        return Row(messages, None, tuple(tools) or None, kwargs, columns, where)

    def chat(self, record: dict[str, Any]) -> Turns:
        if self.shape.format == "alpaca":
            return self.alpaca(record)
        if self.shape.format == "sharegpt":
            return self.turns(record["conversations"], "conversations", ("from", "value"), SHAREGPT)
        if self.shape.format == "messages":
            return self.turns(record["messages"], "messages", ("role", "content"), OPENAI)
        return self.prompt_completion(record)

    def alpaca(self, record: dict[str, Any]) -> Turns:
        turns: Turns = []
        history = self.parsed(record.get("history"), "history", list)
        for at, pair in enumerate(history):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                self.wrong(f"history[{at}]", show(pair), "a pair: [what the user said, the answer]")
                continue
            for role, value, part in zip(("user", "assistant"), pair, (0, 1), strict=True):
                place = f"history[{at}][{part}]"
                turns.append((place, {"role": role, "content": self.text(value, place)}))
        below = record.get("input")
        asked = self.text(record["instruction"], "instruction", blank=bool(below))
        if below not in (None, ""):
            below = self.text(below, "input", blank=True)
            asked = f"{asked}\n{below}" if asked else below
        turns.append(("instruction", {"role": "user", "content": asked}))
        turns.append(("output", {"role": "assistant", "content": self.text(record["output"], "output")}))
        return turns

    def prompt_completion(self, record: dict[str, Any]) -> Turns:
        asked, answer = self.shape.needs
        if isinstance(record[asked], list) and isinstance(record[answer], list):
            prompt = self.turns(record[asked], asked, ("role", "content"), OPENAI)
            if any(turn["role"] == "assistant" for _, turn in prompt):
                self.notes[f"an answer inside {asked!r} counts as one to learn, like every assistant turn"] += 1
            return prompt + self.turns(record[answer], answer, ("role", "content"), OPENAI)
        return [
            (asked, {"role": "user", "content": self.text(record[asked], asked)}),
            (answer, {"role": "assistant", "content": self.text(record[answer], answer)}),
        ]
