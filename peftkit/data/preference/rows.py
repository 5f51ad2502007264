"""Records → preferences: which columns hold prompt and answers, and both answers as conversations of one prompt.

| columns | what they are |
|---|---|
| `prompt`, `chosen`, `rejected` | three texts; or lists of messages, the prompt's and an answer's |
| `conversations`, `chosen`, `rejected` | LLaMA-Factory: turns of `from` and `value`, and two last turns |
| `messages`, `chosen`, `rejected` | the same with turns of `role` and `content` |
| `instruction` (`input`, `history`), `chosen`, `rejected` | alpaca with two answers; `output` is not read |
| `chosen`, `rejected` | two whole conversations, alike but for their last message |
| a row of any format of `data.formats`, and `label` | one answer: true says that it is wanted |

Each conversation is read by `data.formats`, so that what is a turn, a tool call or an empty text is what it is for
supervised rows. A `prompt` text beside whole conversations must be what their user says last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.data.formats import Row, convert
from peftkit.data.json_records import parse_json
from peftkit.data.preference.spec import Kind
from peftkit.data.readers import Records, Where, read
from peftkit.data.turns import Problem, show
from peftkit.errors import DataError

_SIDES = ("chosen", "rejected")
_SPEAKERS = {
    "sharegpt": ("conversations", "from", "value", "gpt"),
    "messages": ("messages", "role", "content", "assistant"),
}
"""The column of the prompt, the names of speaker and text in a turn, and what the assistant is called."""
_TRUE, _FALSE = (True, 1, "true"), (False, 0, "false")


@dataclass(frozen=True)
class PreferenceRow:
    """One preference: two conversations that differ in their last message, or one and whether it is wanted."""

    chosen: Row
    rejected: Row | None = None
    desirable: bool | None = None

    @property
    def where(self) -> Where:
        """File and line."""
        return self.chosen.where

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """What is answered."""
        return self.chosen.messages[:-1]


@dataclass(frozen=True)
class PreferenceSet:
    """All preferences of one source, in its order, and how they were read."""

    rows: tuple[PreferenceRow, ...]
    format: str
    reason: str
    source: str
    sha256: str
    problems: tuple[Problem, ...] = ()
    """What is wrong with records that became no rows."""


def load_preferences(source: str | Path, kind: Kind) -> PreferenceSet:
    """Read a file or Hub set; raises DataError when its columns are none of the above, or no record can be used.

    What is wrong with single records is returned with the others. Pairs read as `labelled` give two rows each.
    """
    records = read(source)
    columns = [record.keys() for _, record in records.records]
    if all(keys >= {*_SIDES} for keys in columns):
        pairs = _pairs(records)
        return pairs if kind == "pairs" else _unpaired(pairs)
    if all("label" in keys for keys in columns):
        if kind == "labelled":
            return _labelled(records)
        raise DataError(
            f"{records.source}: every row has 'label', and this recipe compares two answers to one prompt",
            expected="columns 'chosen' and 'rejected'",
            hint="learn from single answers with the recipe kto",
        )
    raise _unknown(records, kind)


def _unknown(records: Records, kind: Kind) -> DataError:
    needed = {*_SIDES} if kind == "pairs" else {"label"}
    where, record = next((where, record) for where, record in records.records if not record.keys() >= needed)
    count = sum(not record.keys() >= needed for _, record in records.records)
    names = ", ".join(map(repr, list(record)[:12])) or "(none)"
    either = "'chosen' and 'rejected'" + ("" if kind == "pairs" else ", or an answer and 'label' (true or false)")
    return DataError(
        f"{records.source}: {count:,} of {len(records.records):,} rows hold no preference, first {where} with the "
        f"columns {names}",
        expected=f"{either}, in every row",
        hint="rename the columns, or learn to give answers as they stand with a recipe such as qlora_sft",
    )


def _pairs(records: Records) -> PreferenceSet:
    shape = _shape([record for _, record in records.records])
    sides = [_read_side(records, shape, side) for side in _SIDES]
    found: list[dict[int, Row]] = [{row.where.index: row for row in rows} for rows, _, _ in sides]
    # What is wrong with a prompt is wrong in both conversations, and told once.
    problems = list(dict.fromkeys(problem for _, told, _ in sides for problem in told))
    rows = []
    for where, record in records.records:
        chosen, rejected = (rows_of.get(where.index) for rows_of in found)
        if chosen is None or rejected is None:
            continue
        wrong = list(_differences(record, chosen, rejected))
        problems += wrong
        if not wrong:
            rows.append(PreferenceRow(chosen, rejected))
    if not rows:
        raise _refusal(problems, records)
    reason = f"every row has 'chosen' and 'rejected'; {sides[0][2]}"
    return PreferenceSet(tuple(rows), f"{shape} pairs", reason, records.source, records.sha256, tuple(problems))


def _shape(records: list[dict[str, Any]]) -> str:
    """How all records hold their prompt; whole conversations go before a prompt, which then only repeats."""
    if all(_is_whole(record["chosen"]) and _is_whole(record["rejected"]) for record in records):
        return "whole conversations"
    for column, shape in (("prompt", "prompt"), ("conversations", "sharegpt"), ("messages", "messages")):
        if all(column in record for record in records):
            return shape
    return "alpaca" if all("instruction" in record for record in records) else "whole conversations"


def _is_whole(value: Any) -> bool:
    """Whether an answer is a conversation with its prompt: its first message is not the assistant's."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # csv cannot nest
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            return False
    first = value[0] if isinstance(value, list) and len(value) > 1 else None
    return isinstance(first, dict) and first.get("role", "assistant") != "assistant"


def _read_side(records: Records, shape: str, side: str) -> tuple[tuple[Row, ...], list[Problem], str]:
    """The conversations that end in this side's answer; problems name the side's column where they are its own."""
    rewritten = [(where, _as_supervised(record, shape, side)) for where, record in records.records]
    format = {"prompt": "prompt_completion", "whole conversations": "messages"}.get(shape, shape)
    own = {"prompt": "completion", "alpaca": "output", "whole conversations": "messages"}.get(shape)
    try:
        read = convert(Records(tuple(rewritten), records.source, records.sha256), format, strict=False)
    except DataError as error:
        fact = error.fact if own is None else error.fact.replace(f": {own}", f": {side}")
        raise DataError(f"{side!r}: {fact}", expected=error.expected, hint=error.hint) from None
    problems = []
    originals = {where.index: record for where, record in records.records}
    for problem in read.problems:
        name = own
        if name is None:
            column = _SPEAKERS[shape][0]
            prompt = originals[problem.where.index].get(column)
            name = f"{column}[{len(prompt)}]" if isinstance(prompt, list) else column
        field = problem.field
        problems.append(replace(problem, field=side + field[len(name) :] if field.startswith(name) else field))
    return read.rows, problems, read.reason


def _as_supervised(record: dict[str, Any], shape: str, side: str) -> dict[str, Any]:
    """The record as a row of a supervised format that ends in this side's answer."""
    others, answer = {key: value for key, value in record.items() if key not in _SIDES}, record[side]
    if shape == "alpaca":
        return {**others, "output": answer}
    if shape == "whole conversations":
        return {
            **{key: value for key, value in others.items() if key not in ("messages", "prompt")},
            "messages": answer,
        }
    if shape == "prompt":
        prompt = others["prompt"]
        if isinstance(prompt, str) and isinstance(answer, str):
            return {**others, "completion": answer}
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {**others, "prompt": asked, "completion": _turns(answer, "messages")}
    prompt = others[_SPEAKERS[shape][0]]
    if isinstance(prompt, str):
        try:
            prompt = parse_json(prompt)
        except (ValueError, RecursionError):
            return others
    whole = [*prompt, *_turns(answer, shape)] if isinstance(prompt, list) else prompt
    return {**others, _SPEAKERS[shape][0]: whole}


def _turns(answer: Any, shape: str) -> list[Any]:
    """An answer as a list of turns: a text is the assistant's."""
    _, said, held, assistant = _SPEAKERS[shape]
    if isinstance(answer, list):
        return answer
    return [{said: assistant, held: answer} if answer is None or isinstance(answer, str) else answer]


def _differences(record: dict[str, Any], chosen: Row, rejected: Row) -> Iterator[Problem]:
    """What keeps two conversations from being two answers to one prompt."""
    if chosen.messages[:-1] != rejected.messages[:-1]:
        yield Problem(chosen.where, "rejected", "another prompt than that of 'chosen'", "two answers to one prompt")
    elif chosen.messages[-1] == rejected.messages[-1]:
        yield Problem(chosen.where, "rejected", "the same answer as 'chosen'", "two different answers")
    asked = [message.get("content") for message in chosen.messages if message["role"] == "user"]
    prompt = record.get("prompt")
    if _is_whole(record["chosen"]) and isinstance(prompt, str) and asked and prompt not in (asked[-1], asked[0]):
        yield Problem(chosen.where, "prompt", show(prompt), "what the user says in 'chosen'")


def _unpaired(pairs: PreferenceSet) -> PreferenceSet:
    rows = []
    for pair in pairs.rows:
        assert pair.rejected is not None
        rows += [PreferenceRow(pair.chosen, desirable=True), PreferenceRow(pair.rejected, desirable=False)]
    reason = f"each pair gives a wanted and an unwanted answer; {pairs.reason}"
    return replace(pairs, rows=tuple(rows), format=f"{pairs.format}, unpaired", reason=reason)


def _labelled(records: Records) -> PreferenceSet:
    read = convert(records, "auto", strict=False)
    problems, rows = list(read.problems), []
    for row in read.rows:
        label = row.columns["label"].strip().lower() if isinstance(row.columns["label"], str) else row.columns["label"]
        if row.text is not None:
            problems.append(Problem(row.where, "text", "a plain text", "a prompt and an answer to it"))
        elif label not in (*_TRUE, *_FALSE):
            problems.append(Problem(row.where, "label", show(row.columns["label"]), "true or false"))
        else:
            rows.append(PreferenceRow(row, desirable=label in _TRUE))
    if not rows:
        raise _refusal(problems, records)
    return PreferenceSet(
        tuple(rows), f"{read.format}, labelled", read.reason, read.source, read.sha256, tuple(problems)
    )


def _refusal(problems: list[Problem], records: Records) -> DataError:
    lines = [f"- {problem}" for problem in problems[:20]]
    more = [f"- and {len(problems) - 20:,} more"] if len(problems) > 20 else []
    fact = f"{records.source}: none of {len(records.records):,} rows can be used"
    return DataError("\n".join([fact, *lines, *more]), expected="preferences", hint="edit these rows")
