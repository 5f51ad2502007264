"""Read, render, check and count the data of a run before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from peftkit.base.tokenizer import Tokenizer
from peftkit.config import Spec
from peftkit.data.chat import IGNORED, Example, Loss, Rendering, Template, Think, encode_row
from peftkit.data.formats import Dataset, Row, load_rows
from peftkit.data.overlap import ngram_overlap
from peftkit.data.split import split
from peftkit.errors import DataError
from peftkit.events import Note, Report, Table, Warned, silent

_LISTED = 5


class DataSpec(Spec):
    """What to learn from, and what to measure on."""

    train: str | None = None
    """json, jsonl, csv, tsv, parquet or txt file, or a Hub data set (`owner/name:split`)."""
    held_out: str | None = None
    """A file of rows that are never trained on; without it, `held_out_share` of the training file is set aside."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training file to set aside when no held-out file is given."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto"
    """auto looks at the columns of every row and says what it found."""
    loss: Loss = "assistant"
    """Where the loss falls: every assistant turn, only the last, or every token."""
    think: Think = "keep"
    """Whether `<think>` blocks of answers are learned or removed."""
    template: Template = "base"
    """The base's own chat template, or plain text for bases without one."""
    template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, such as {enable_thinking: false}."""
    max_length: int | None = Field(default=None, gt=1)
    """Longest sequence in tokens; None takes the base's own limit."""
    too_long: Literal["raise", "drop", "truncate"] = "raise"
    """What happens to a row above max_length."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on the first so many rows only."""
    max_held_out_rows: int | None = Field(default=None, gt=0)
    """Measure on the first so many held-out rows only."""
    seed: int = 0
    """Seed of the split."""
    license: str | None = None
    """Licence of the rows, such as cc-by-4.0; it is kept with the adapter and stands on its model card."""

    @property
    def rendering(self) -> Rendering:
        """How rows become tokens."""
        return Rendering(self.loss, self.think, self.template, self.template_kwargs)


def recorded_rendering(config: Mapping[str, Any]) -> Rendering:
    """How an adapter's training rendered its rows, from the settings in its manifest; the default where none stand."""
    data = config.get("data")
    known = {key: data[key] for key in DataSpec.model_fields if key in data} if isinstance(data, Mapping) else {}
    return DataSpec.model_validate(known).rendering


@dataclass(frozen=True)
class Part:
    """Encoded rows of one role, with what was lost on the way."""

    role: Literal["train", "held_out"]
    source: str
    sha256: str
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    dropped: tuple[str, ...]
    """Places of rows that are left out: too long, or without any answer left."""
    truncated: tuple[str, ...]
    """Places of rows that were cut and still keep some of their answer."""
    license: str | None = None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        """Tokens the loss falls on."""
        return sum(example.answer_tokens for example in self.examples)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: digests and counts, no rows."""
        return {
            "role": self.role,
            "source": Path(self.source).name,
            "sha256": self.sha256,
            "rows": len(self.rows),
            "tokens": self.tokens,
            "dropped": len(self.dropped),
            "license": self.license,
        }


@dataclass(frozen=True)
class Audit:
    """The data of a run, ready to train on and to measure with."""

    train: Part
    held_out: Part
    rendering: Rendering
    overlap: float
    """Highest share of a held-out prompt's word 8-grams that occur anywhere in the training prompts."""


def audit(spec: DataSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent) -> Audit:
    """Read and encode training and held-out rows; `limit` is the base's longest sequence.

    Raises DataError for rows that cannot be used, and for too long rows when `too_long` is `raise`.
    """
    if spec.train is None:
        raise DataError(
            "data.train is not set", expected="a file of rows", hint="peftkit train … data.train=rows.jsonl"
        )
    train_set = load_rows(spec.train, spec.format)
    report(Note(f"{train_set.source}: {len(train_set.rows)} rows, format {train_set.format} ({train_set.reason})"))
    train_rows, held_rows, held_set = _divide(spec, train_set, report)
    length = min(filter(None, (spec.max_length, limit)), default=None)
    if spec.max_length and limit and spec.max_length > limit:
        report(Warned(f"data.max_length={spec.max_length} is above the base's longest sequence, so {limit} holds"))
    train = encode(train_rows[: spec.max_train_rows], train_set, "train", tokenizer, spec, length)
    held = encode(held_rows[: spec.max_held_out_rows], held_set, "held_out", tokenizer, spec, length)
    for part in (train, held):
        _report_losses(part, length, report)
    result = Audit(train, held, spec.rendering, _overlap(train, held))
    _report_counts(result, report)
    return result


def encode(
    rows: Sequence[Row],
    source: Dataset,
    role: Literal["train", "held_out"],
    tokenizer: Tokenizer,
    spec: DataSpec,
    length: int | None,
) -> Part:
    """Encode rows and apply the length policy. Raises DataError listing the rows that cannot be used."""
    examples: list[Example] = []
    # By place, in order: a row of several sequences is one row to its author.
    dropped: dict[str, None] = {}
    truncated: dict[str, None] = {}
    too_long: dict[str, int] = {}
    refused: list[DataError] = []
    for index, row in enumerate(rows):
        try:
            encoded = encode_row(row, index, tokenizer, spec.rendering)
        except DataError as error:
            refused.append(error)
            continue
        for example in encoded:
            kept: Example | None = example
            if length is not None and len(example.input_ids) > length:
                too_long[example.where] = max(len(example.input_ids), too_long.get(example.where, 0))
                kept = _cut(example, length) if spec.too_long == "truncate" else None
            if kept is None or kept.answer_tokens == 0:
                dropped[example.where] = None
                continue
            if kept is not example:
                truncated[example.where] = None
            examples.append(kept)
    if refused:
        _refuse(refused, len(rows), role)
    if too_long and spec.too_long == "raise":
        raise DataError(
            f"{len(too_long)} of {len(rows)} {role} rows are longer than {length} tokens: "
            + _some([f"{place} ({tokens} tokens)" for place, tokens in too_long.items()]),
            expected=f"at most {length} tokens per row",
            hint="set data.max_length higher, or choose data.too_long=drop or data.too_long=truncate",
        )
    if not examples:
        raise DataError(f"no {role} row of {source.source} is left to use", expected="at least one row with an answer")
    lost = tuple(dropped), tuple(truncated)
    return Part(role, source.source, source.sha256, tuple(rows), tuple(examples), *lost, spec.license)


def _refuse(errors: list[DataError], rows: int, role: str) -> None:
    """Raise one error for all rows that cannot be rendered; one alone is raised as it is."""
    if len(errors) == 1:
        raise errors[0]
    listed = "".join(f"\n- {error.fact}" for error in errors[:20])
    more = f"\n- and {len(errors) - 20} more" if len(errors) > 20 else ""
    fact = f"{len(errors)} of {rows} {role} rows cannot be used:{listed}{more}"
    raise DataError(fact, expected=errors[0].expected, hint=errors[0].hint)


def _cut(example: Example, length: int) -> Example:
    labels = example.labels[:length]
    start = min(example.answer_start, length)
    return Example(example.input_ids[:length], labels, start, example.row, example.where, example.stop_added)


def _divide(spec: DataSpec, train_set: Dataset, report: Report) -> tuple[Sequence[Row], Sequence[Row], Dataset]:
    if spec.held_out:
        held_set = load_rows(spec.held_out, spec.format)
        report(Note(f"{held_set.source}: {len(held_set.rows)} held-out rows, format {held_set.format}"))
        return train_set.rows, held_set.rows, held_set
    parts = split(train_set.rows, spec.held_out_share, spec.seed, key=lambda row: repr((row.messages, row.text)))
    report(Note(f"no data.held_out: {len(parts.held_out)} rows set aside with seed {spec.seed}"))
    return parts.train, parts.held_out, train_set


def _overlap(train: Part, held: Part) -> float:
    return ngram_overlap([_prompt_text(row) for row in held.rows], [_prompt_text(row) for row in train.rows]).highest


def _prompt_text(row: Row) -> str:
    if row.text is not None:
        return row.text
    return "\n".join(str(m.get("content") or "") for m in row.messages if m["role"] not in ("assistant", "system"))


def _report_losses(part: Part, length: int | None, report: Report) -> None:
    if part.truncated:
        report(
            Warned(
                f"{len(part.truncated)} {part.role} rows were cut to {length} tokens and lost the end of their answer, "
                f"the end-of-turn token with it: {_some(part.truncated)}",
                "set data.max_length higher",
            )
        )
    if part.dropped:
        report(
            Warned(
                f"{len(part.dropped)} {part.role} rows are left out: {_some(part.dropped)}",
                "set data.max_length higher",
            )
        )
    added = sum(example.stop_added for example in part.examples)
    if added:
        report(Warned(f"the template ends no turn, so the end-of-sequence token was added to {added} {part.role} rows"))


def _report_counts(data: Audit, report: Report) -> None:
    rows = tuple(
        (
            part.role.replace("_", "-"),
            len(part.rows),
            len(part.examples),
            part.tokens,
            part.answer_tokens,
            max(len(example.input_ids) for example in part.examples),
            len(part.dropped),
            len(part.truncated),
        )
        for part in (data.train, data.held_out)
    )
    columns = ("data", "rows", "sequences", "tokens", "learned tokens", "longest", "left out", "cut")
    report(Table("data", columns, rows))
    report(Note(f"highest word 8-gram overlap of a held-out prompt with the training prompts: {data.overlap:.2f}"))
    if data.overlap > 0.5:
        report(Warned("some held-out rows are close to training rows, so their figures flatter the adapter"))


def _some(places: Sequence[str]) -> str:
    rest = len(places) - _LISTED
    return ", ".join(places[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


__all__ = ["IGNORED", "Audit", "DataSpec", "Part", "audit", "encode"]
