"""Rows of one role, encoded under the length policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import Example, encode_rows
from peftkit.data.encoded import MANY, EncodedRows, Gathering, answer_tokens, lengths
from peftkit.data.encoded_key import digest_rows, encoding_key
from peftkit.data.encoded_store import EncodedStore, Entry
from peftkit.data.formats import Dataset, Row
from peftkit.data.spec import DataSpec
from peftkit.errors import DataError
from peftkit.events import Note, Warned

_LISTED = 5
Role = Literal["train", "held_out"]


R = TypeVar("R")
E = TypeVar("E")


@dataclass(frozen=True)
class PartOf(Generic[R, E]):
    """Rows of one role and the examples that they became, with what was lost on the way."""

    role: Role
    source: str
    sha256: str
    rows: tuple[R, ...]
    examples: Sequence[E]
    """A tuple; of many tokens `EncodedRows`, which builds an example when it is asked for."""
    dropped: tuple[str, ...] = ()
    """Places of rows that are left out: too long, or without any answer left."""
    truncated: tuple[str, ...] = ()
    """Places of rows that were cut and still keep some of their answer."""
    license: str | None = None

    @property
    def tokens(self) -> int:
        """All tokens (of images, positions)."""
        return int(lengths(self.examples).sum())

    @property
    def answer_tokens(self) -> int:
        """Tokens the loss falls on; of a task, what it is a sum over."""
        return int(answer_tokens(self.examples).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(lengths(self.examples).max(initial=0))

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
class Part(PartOf[Row, Example]):
    """Conversations of one role."""


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
    rows: Sequence[Row],
    source: Dataset,
    role: Role,
    tokenizer: Tokenizer,
    spec: DataSpec,
    length: int | None,
    *,
    store: EncodedStore | None = None,
    sha256: str | None = None,
) -> Encoding:
    """Encode what can be encoded, and list the rest.

    With a `store`, what was encoded before is taken from it, and many tokens are kept in it; `sha256` is what
    `digest_rows` says of the rows, where that is known.
    """
    key = encoding_key(sha256 or digest_rows(rows), tokenizer, spec, length) if store is not None else None
    if store is None or key is None:
        return _encoded(rows, source, role, tokenizer, spec, length)
    entry = store.load(key)
    if entry is not None:
        facts, examples = entry.facts, _mapped(entry, store, len(rows))
        if examples is not None:
            store.report(Note(f"{role.replace('_', '-')} rows: encoded before, in {entry.folder}"))
            lost = tuple(facts["dropped"]), tuple(facts["truncated"])
            part = Part(role, source.source, source.sha256, tuple(rows), examples, *lost, spec.license)
            return Encoding(part, (), dict(facts["too_long"]))
    encoding = _encoded(rows, source, role, tokenizer, spec, length, store.many)
    if entry is not None and entry.folder.is_dir():  # it cannot be used and stays: that was told
        return encoding
    return _kept(encoding, store, key)


def _mapped(entry: Entry, store: EncodedStore, rows: int) -> EncodedRows | None:
    """The examples of an entry that was found whole; None where another process has removed it since.

    None too, and a warning, where they cannot be mapped or are not of so many rows.
    """
    try:
        examples = EncodedRows.mapped(entry.folder)
        if examples.of(rows):
            return examples
        reason = f"they are not all of {rows:,} rows"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error)
    store.report(Warned(f"the encoded rows {entry.folder} are not used: {reason}", "`peftkit runs gc --encoded`"))
    return None


def _kept(encoding: Encoding, store: EncodedStore, key: dict[str, Any]) -> Encoding:
    """The same encoding, its rows mapped; few rows and refused ones are not kept, as there is little to save."""
    part = encoding.part
    if not isinstance(part.examples, EncodedRows) or encoding.refused:
        return encoding
    too_long = list(map(list, encoding.too_long.items()))
    facts = {"dropped": part.dropped, "truncated": part.truncated, "too_long": too_long}
    entry = store.save(key, facts, part.examples.write)
    examples = _mapped(entry, store, len(part.rows)) if entry is not None else None
    return replace(encoding, part=replace(part, examples=examples)) if examples is not None else encoding


def _encoded(
    rows: Sequence[Row],
    source: Dataset,
    role: Role,
    tokenizer: Tokenizer,
    spec: DataSpec,
    length: int | None,
    many: int = MANY,
) -> Encoding:
    examples = Gathering(many)
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
            examples.add(kept)
    lost = tuple(dropped), tuple(truncated)
    part = Part(role, source.source, source.sha256, tuple(rows), examples.done(), *lost, spec.license)
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
