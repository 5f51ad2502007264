"""Rows of one role, encoded under the length policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import Example, encode_rows
from peftkit.data.formats import Dataset, Row
from peftkit.data.spec import DataSpec
from peftkit.errors import DataError

_LISTED = 5
Role = Literal["train", "held_out"]


@dataclass(frozen=True)
class Part:
    """Encoded rows of one role, with what was lost on the way."""

    role: Role
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
class Encoding:
    """A part, and the rows that keep it from being used."""

    part: Part
    refused: tuple[tuple[str, DataError], ...]
    """Place of each row that cannot be rendered, with the reason."""
    too_long: dict[str, int]
    """Place of each row above the limit, with its tokens."""


def encode(
    rows: Sequence[Row], source: Dataset, role: Role, tokenizer: Tokenizer, spec: DataSpec, length: int | None
) -> Part:
    """Encode rows and apply the length policy. Raises DataError listing the rows that cannot be used."""
    encoding = attempt(rows, source, role, tokenizer, spec, length)
    if encoding.refused:
        _refuse([error for _, error in encoding.refused], len(rows), role)
    if encoding.too_long and spec.too_long in ("raise", "split"):
        raise DataError(
            f"{len(encoding.too_long)} of {len(rows)} {role} rows are longer than {length} tokens: "
            + _some([f"{place} ({tokens} tokens)" for place, tokens in encoding.too_long.items()]),
            expected=f"at most {length} tokens per row",
            hint="set data.max_length higher, or choose data.too_long=drop or data.too_long=truncate"
            + (": only plain texts can be split" if spec.too_long == "split" else ""),
        )
    if not encoding.part.examples:
        raise DataError(f"no {role} row of {source.source} is left to use", expected="at least one row with an answer")
    return encoding.part


def attempt(
    rows: Sequence[Row], source: Dataset, role: Role, tokenizer: Tokenizer, spec: DataSpec, length: int | None
) -> Encoding:
    """Encode what can be encoded, and list the rest."""
    examples: list[Example] = []
    # By place, in order: a row of several sequences is one row to its author.
    dropped: dict[str, None] = {}
    truncated: dict[str, None] = {}
    too_long: dict[str, int] = {}
    refused: list[tuple[str, DataError]] = []
    for row, encoded in zip(rows, encode_rows(rows, tokenizer, spec.rendering), strict=True):
        if isinstance(encoded, DataError):
            refused.append((str(row.where), encoded))
            continue
        if length is not None and spec.too_long == "split" and row.text is not None:
            encoded = [window for example in encoded for window in _windows(example, length)]
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
    lost = tuple(dropped), tuple(truncated)
    part = Part(role, source.source, source.sha256, tuple(rows), tuple(examples), *lost, spec.license)
    return Encoding(part, tuple(refused), too_long)


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


def _windows(example: Example, length: int) -> list[Example]:
    """A text as sequences of at most `length` tokens, each after the first beginning with the last one's last token.

    So every token but the text's first is predicted exactly once, and the windows are as even as they can be.
    """
    predicted = len(example.input_ids) - 1
    count = max(1, -(-predicted // (length - 1)))
    edges = [predicted * at // count for at in range(count + 1)]
    cuts = [slice(start, end + 1) for start, end in pairwise(edges)]
    return [replace(example, input_ids=example.input_ids[cut], labels=example.labels[cut]) for cut in cuts]


def _some(places: Sequence[str]) -> str:
    rest = len(places) - _LISTED
    return ", ".join(places[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
