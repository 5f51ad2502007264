"""Texts that a causal base is asked to write: rows → conversations, audited and encoded as supervised fine-tuning is.

A row becomes one question, the instruction and after a blank line the source, and one answer, the target text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer

# The same counts and findings, word for word, as the rows of supervised fine-tuning get.
from peftkit.data.audit import Audit, losses, report_counts
from peftkit.data.audited import longest_allowed
from peftkit.data.chat import encode_row
from peftkit.data.findings.finding import Tally
from peftkit.data.findings.kept import examine
from peftkit.data.findings.lengths import check_all
from peftkit.data.findings.told import heed, heed_measured
from peftkit.data.formats import Dataset, Row
from peftkit.data.overlap import ngram_overlap
from peftkit.data.part import Encoding, Part, Role, attempt
from peftkit.data.spec import DataSpec
from peftkit.data.tasks.heads import head_of
from peftkit.data.tasks.languages import recorded_language, target_language
from peftkit.data.tasks.read import TaskDataset
from peftkit.data.tasks.sides import Sides, read_sides
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskExample, TaskName, TaskPart, TaskRow
from peftkit.data.template import Rendering
from peftkit.errors import BaseError, ConfigError, DataError
from peftkit.events import Note, Report, Warned, silent

SUMMARIZE = "Summarize the text in a few sentences."


@dataclass(frozen=True)
class AskedRows:
    """Rows to measure on, as conversations and as the rows of the task that those were made of."""

    task: TaskName
    instruction: str
    head: Head
    """Of the task: no base is loaded with it."""
    rendering: Rendering
    asked: Part
    held: TaskPart
    """The rows of the task, with an example for each that was not left out."""


@dataclass(frozen=True, kw_only=True)
class AskedAudit(Audit):
    """The conversations of a run, and the rows of the task that they were made of."""

    task: TaskName
    instruction: str
    head: Head
    """Of the task: no base is loaded with it."""
    train_rows: tuple[TaskRow, ...]
    held: TaskPart
    """The held-out rows, with an example for each that was not left out."""

    @property
    def measured(self) -> AskedRows:
        """The held-out rows in both forms."""
        return AskedRows(self.task, self.instruction, self.head, self.rendering, self.held_out, self.held)

    def record(self) -> dict[str, Any]:
        """What `audit.json` of a run holds."""
        return {**super().record(), "instruction": self.instruction}


def conversation(row: TaskRow, instruction: str) -> Row:
    """A row as a question and its answer; without a target the answer is empty."""
    asked = {"role": "user", "content": f"{instruction}\n\n{row.text}"}
    answer = {"role": "assistant", "content": row.target or ""}
    return Row((asked, answer), None, None, {}, row.columns, row.where)


def instruction_of(spec: TaskSpec, told: Mapping[str, str | None]) -> tuple[str, str]:
    """What is asked of the base before each source text, and why; `told` are the languages that names of files tell.

    Raises DataError where they say that not all targets are of one language.
    """
    language = _one_language(told) if spec.task == "translation" else None
    if spec.instruction is not None:
        return spec.instruction, "data.instruction"
    if spec.task == "summarization":
        return SUMMARIZE, "by default"
    if language is not None:
        return f"Translate into {language}.", "by the name of the column or the file"
    return "Translate the text.", "no name says into which language"


def instruction_later(spec: TaskSpec, recorded: str | None, source: str, data: TaskDataset) -> str:
    """What is asked before the rows of a further file: what the run `recorded`, or what training would have found.

    `spec` are the settings of training, whose names of files and columns are looked at again beside those of this file.
    Raises DataError where they say that not all targets are of one language.
    """
    trained = [*spec.mixture, *filter(None, (spec.train, spec.held_out))]
    told = {name: recorded_language(name, spec.label) for name in trained}
    told[source] = target_language(source, data.label)
    return instruction_of(spec if recorded is None else spec.model_copy(update={"instruction": recorded}), told)[0]


def audit_asked(spec: TaskSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent) -> AskedAudit:
    """Read the rows of a task, make conversations of them, encode and examine them as `data.audit.audit` does.

    `limit` is the base's longest sequence. A row that `too_long=truncate` cuts loses the end of its source, and keeps
    its answer. Raises DataError with every problem of the rows and for findings that make the run certainly wrong,
    ConfigError for settings that do not go together, BaseError for a base without a chat template.
    """
    settings = _settings(spec, tokenizer)
    sides = read_sides(spec, report, None)
    instruction, reason = instruction_of(spec, _told(spec, sides))
    report(Note(f"each row is asked as {instruction!r} ({reason}), a blank line and the text"))
    if spec.task == "translation" and spec.instruction is None and reason.startswith("no name"):
        report(Warned("the instruction names no language", "data.instruction='Translate into …'"))
    result = _inspect(spec, settings, sides, instruction, tokenizer, limit, report)
    heed(result.findings, report)
    return result


def encode_asked(
    spec: TaskSpec,
    data: TaskDataset,
    instruction: str,
    tokenizer: Tokenizer,
    limit: int | None,
    report: Report = silent,
) -> AskedRows:
    """Make conversations of rows that are measured alone, and encode them as `audit_asked` does held-out rows.

    Raises what it raises for rows that cannot be used.
    """
    settings = _settings(spec, tokenizer)
    length = longest_allowed(spec.max_length, limit)
    encoding = _encoded("held_out", data, data.rows, instruction, tokenizer, settings, length)
    tally = Tally(0, len(data.rows))
    losses(encoding, settings, length, tally)
    mend = "--too-long truncate cuts their sources, --too-long drop leaves them out"
    heed_measured(tally.findings(settings.accept), report, mend)
    head = head_of(spec, data.rows)
    return AskedRows(
        spec.task, instruction, head, settings.rendering, encoding.part, _as_task(encoding.part, data.rows)
    )


def _settings(spec: TaskSpec, tokenizer: Tokenizer) -> DataSpec:
    """The settings that both kinds of rows have."""
    if spec.too_long == "windows":
        raise ConfigError(
            ["data.too_long=windows is for tokens and questions: a text is written from its whole source"],
            hint="data.too_long=drop, or truncate, which cuts sources",
        )
    shared = {name: getattr(spec, name) for name in DataSpec.model_fields if name in TaskSpec.model_fields}
    settings = DataSpec.model_validate({name: value for name, value in shared.items() if value is not None})
    if settings.template == "base" and not tokenizer.has_template:
        raise BaseError(
            "the base has no chat template, so it cannot be asked for a text",
            expected="a base that chats (often named Instruct), or an encoder-decoder such as T5, BART or Marian",
        )
    return settings


def _inspect(
    spec: TaskSpec,
    settings: DataSpec,
    sides: Sides,
    instruction: str,
    tokenizer: Tokenizer,
    limit: int | None,
    report: Report,
) -> AskedAudit:
    length = longest_allowed(spec.max_length, limit, report)
    written, held = ([conversation(row, instruction) for row in rows] for rows in (sides.written, sides.held_out))
    sources = [row.text for row in sides.held_out], [row.text for row in sides.written]
    examined = examine(written, held, tokenizer.control, None, lambda: ngram_overlap(*sources).highest)
    given: tuple[tuple[Role, TaskDataset, Sequence[TaskRow]], ...] = (
        ("train", sides.train_set, sides.train),
        ("held_out", sides.held_set, sides.held_out),
    )
    encodings = [_encoded(role, source, rows, instruction, tokenizer, settings, length) for role, source, rows in given]
    tally, overlap = examined()
    for encoding in encodings:
        losses(encoding, settings, length, tally)
    train, held_out = (encoding.part for encoding in encodings)
    check_all([(part.rows, part.examples) for part in (train, held_out)], tokenizer, tally)
    result = AskedAudit(
        train=train,
        held_out=held_out,
        rendering=settings.rendering,
        overlap=overlap,
        findings=tally.findings(settings.accept),
        task=spec.task,
        instruction=instruction,
        head=sides.head,
        train_rows=sides.train,
        held=_as_task(held_out, sides.held_out),
    )
    report_counts(result, report)
    return result


def _encoded(
    role: Role,
    source: TaskDataset,
    rows: Sequence[TaskRow],
    instruction: str,
    tokenizer: Tokenizer,
    settings: DataSpec,
    length: int | None,
) -> Encoding:
    """Rows as conversations with the length policy applied; those that are cut are named in the part."""
    asked, cut = [conversation(row, instruction) for row in rows], []
    if settings.too_long == "truncate" and length is not None:
        for at, row in enumerate(rows):
            shorter = _cut(row, instruction, tokenizer, settings.rendering, length)
            if shorter is not None:
                asked[at] = conversation(shorter, instruction)
                cut.append(str(row.where))
    dataset = Dataset(tuple(asked), "asked", source.reason, source.source, source.sha256)
    encoding = attempt(asked, dataset, role, tokenizer, settings, length)
    return replace(encoding, part=replace(encoding.part, truncated=(*cut, *encoding.part.truncated)))


def _cut(row: TaskRow, instruction: str, tokenizer: Tokenizer, rendering: Rendering, length: int) -> TaskRow | None:
    """The row with as much of its source as there is room for; None where it fits, or no cut makes it fit."""
    kept, shorter = tokenizer.encode(row.text), row
    while kept:
        try:
            examples = encode_row(conversation(shorter, instruction), 0, tokenizer, rendering)
        except DataError:  # it is told where all rows are encoded
            return None
        over = max(len(example.input_ids) for example in examples) - length
        if over <= 0:
            return shorter if shorter is not row else None
        kept = kept[: max(0, len(kept) - over)]
        shorter = replace(row, text=tokenizer.decode(kept).rstrip("\ufffd"))  # a character whose last bytes are cut off
    return None


def _as_task(part: Part, rows: Sequence[TaskRow]) -> TaskPart:
    """The rows of the task behind a part of conversations."""
    examples = tuple(
        TaskExample(example.input_ids, tuple(example.labels), example.row, example.where, per_token=True)
        for example in part.examples
    )
    return TaskPart(part.role, part.source, part.sha256, tuple(rows), examples, part.dropped, part.truncated)


def _told(spec: TaskSpec, sides: Sides) -> dict[str, str | None]:
    """The language of the targets by each file of a run, None where its name and its column do not tell it."""
    told = {name: target_language(name, sides.train_set.label) for name in spec.mixture or [spec.train or ""]}
    if spec.held_out is not None:
        told[spec.held_out] = target_language(spec.held_out, sides.held_set.label)
    return told


def _one_language(told: Mapping[str, str | None]) -> str | None:
    """The language of all targets, None where no name tells it."""
    known = {name: language for name, language in told.items() if language is not None}
    if len(set(known.values())) > 1:
        listed = "".join(f"\n- {name}: {language}" for name, language in known.items())
        raise DataError(
            f"the names say that targets are of several languages{listed}",
            expected="one direction in a run: the same columns, or files in the same order, in all",
            hint="of two files the second is the target; name columns with data.text and data.label",
        )
    return next(iter(known.values()), None)
