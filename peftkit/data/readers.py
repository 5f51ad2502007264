"""Files and Hub sets → records with the place each came from.

| ending | a record is |
|---|---|
| `.json` | an object in an array, or in a list under `data`, `rows` or `train` of one object |
| `.jsonl` | a line holding an object; blank lines are skipped |
| `.csv`, `.tsv` | a row under a header line, quoted as RFC 4180 says; every cell is a string |
| `.parquet` | a row |
| `.txt` | a paragraph under the key `text`: the lines between two blank lines, their inner line ends kept as they are |

Each may be gzipped (`.jsonl.gz`). `owner/name`, `owner/name:split` and `owner/name:config:split` name sets on the Hub.
A record is never dropped and no text is changed: a file that cannot be read whole is an error.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftkit.data.json_records import Numbered, json_objects, jsonl_objects
from peftkit.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[^:/]+))??(:(?P<split>[^:/]+))?")
Found = Iterator[tuple["Where", dict[str, Any]]]


@dataclass(frozen=True)
class Where:
    """The place of a record; `line` counts from 1 and is None where there are no lines, `index` counts from 0."""

    file: str
    line: int | None
    index: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file}[{self.index}]"


@dataclass(frozen=True)
class Records:
    """What one source held, with the SHA-256 of the file's bytes (of a Hub set: of its rows as canonical JSON)."""

    records: tuple[tuple[Where, dict[str, Any]], ...]
    source: str
    sha256: str


def read(source: str | Path) -> Records:
    """Read a file, or a set on the Hub; raises DataError when it is missing, empty or cannot be read to its end."""
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.exists() and not _kind(path):
        hub = _HUB.fullmatch(source)
        # "data/tickets" with a folder "data" here is a mistyped file: asking the Hub would send its name abroad
        if hub and (hub["split"] or not path.parent.is_dir()):
            return _read_hub(hub["name"], hub["config"], hub["split"])
    name, kind = str(source), _kind(path)
    _must_be_file(path, name)
    if kind is None:
        ending = "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix
        expected = f"one of {', '.join(SUFFIXES)}, each also with .gz"
        raise DataError(f"{name}: the ending {ending!r} is not known", expected=expected, hint="convert the file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() == ".gz":
        data = _gunzip(data, name)
    found = tuple(_parquet(data, name) if kind == ".parquet" else _PARSERS[kind](_decode(data, name), name))
    if not found:
        raise DataError(f"{name}: holds no rows ({len(data):,} bytes)", expected="at least one row")
    placed = tuple((Where(path.name, where.line, where.index), record) for where, record in found)
    return Records(placed, name, digest)


def _kind(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _must_be_file(path: Path, name: str) -> None:
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in folder.iterdir() if _kind(entry)) if folder.is_dir() else []
    if path.is_dir():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise DataError(f"{name}: is a folder", expected=f"one file; it holds {shown or 'none that peftkit reads'}")
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    nearby = f"near it: {', '.join(near)}" if near else f"{folder} holds none" if folder.is_dir() else f"no {folder}/"
    hint = f"for the Hub set of that name write {name}:train" if _HUB.fullmatch(name) and not _kind(path) else None
    raise DataError(f"{name}: no such file", expected=f"a data file ({nearby})", hint=hint)


def _gunzip(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: is not whole gzip data: {error}", hint="fetch or compress the file again") from error


def _decode(data: bytes, name: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        hint = f"iconv -f UTF-16 -t UTF-8 {name} > utf8-{Path(name).name}"
        raise DataError(f"{name}: starts with the byte order mark of UTF-16", expected="UTF-8", hint=hint)
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fact = f"{name}:{line}: the byte 0x{data[error.start]:02x} is not UTF-8"
        hint = f"if it was written on Windows: iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8-{Path(name).name}"
        raise DataError(fact, expected="UTF-8", hint=hint) from error


def _json(text: str, name: str, objects: Callable[[str, str], Numbered] = json_objects) -> Found:
    for index, (line, row) in enumerate(objects(text, name)):
        yield Where(name, line, index), row


def _csv(text: str, name: str, delimiter: str = ",") -> Found:
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the default refuses cells over 128 KiB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        numbered = _numbered(reader, name)
        first, header = next(numbered, (1, []))
        if len(set(header)) != len(header):
            twice = sorted({column for column in header if header.count(column) > 1})
            raise DataError(
                f"{name}:{first}: the header names {twice} more than once", expected="distinct column names"
            )
        for index, (line, cells) in enumerate(numbered):
            if len(cells) != len(header):
                fact = f"{name}:{line}: {len(cells)} cells where the header has {len(header)}: {cells!r:.80}"
                hint = 'quote a cell that contains the separator: "a, b"'
                raise DataError(fact, expected=f"the cells {', '.join(header)}", hint=hint)
            yield Where(name, line, index), dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _numbered(reader: Any, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield non-blank csv rows with the line each starts on (a quoted cell may span lines)."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = 'inside a quoted cell write " as ""; every opening quote needs its closing one'
            expected = "cells quoted as RFC 4180 says"
            raise DataError(f"{name}:{line}: broken csv: {error}", expected=expected, hint=hint) from error
        if cells:
            yield line, cells


def _txt(text: str, name: str) -> Found:
    start, paragraph, index = 0, "", 0
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            start = start if paragraph else number
            paragraph += line + "\n"
        elif paragraph:
            yield Where(name, start, index), {"text": paragraph[:-1].removesuffix("\r")}
            paragraph, index = "", index + 1


_PARSERS: dict[str, Callable[[str, str], Found]] = {
    ".json": _json,
    ".jsonl": partial(_json, objects=jsonl_objects),
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".txt": _txt,
}


def _parquet(data: bytes, name: str) -> Found:
    import pyarrow  # slow to load, and only this format needs it
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: is not a whole parquet file: {error}", hint="fetch or write it again") from error
    for index, row in enumerate(rows):
        yield Where(name, None, index), row


def _read_hub(name: str, config: str | None, split: str | None) -> Records:
    shown = ":".join(part for part in (name, config, split) if part)
    if Path(name).exists():  # `load_dataset` would quietly prefer it
        raise DataError(f"{shown}: names a set on the Hub, but {name!r} is also here", hint="rename one of them")
    try:
        import datasets  # a second to load, and only Hub sets need it

        loaded = datasets.load_dataset(name, config, split=split)
        if split is None:
            splits = list(loaded)
            split = "train" if "train" in splits else splits[0]
            if split != "train" and len(splits) > 1:
                fact = f"{shown}: has the splits {', '.join(splits)} and no 'train'"
                raise DataError(fact, expected="one split", hint=f"write {shown}:{split}")
            shown, loaded = f"{shown}:{split}", loaded[split]
        rows = [dict(row) for row in loaded]
        canonical = (json.dumps(row, sort_keys=True, separators=(",", ":"), default=_plain) + "\n" for row in rows)
        digest = hashlib.sha256("".join(canonical).encode()).hexdigest()
    except DataError:
        raise
    except Exception as error:  # the Hub, its cache and the parsers raise errors of a dozen unrelated families
        raise DataError(
            f"{shown}: cannot be loaded from the Hub: {(str(error) or type(error).__name__).splitlines()[0]}",
            expected="a public set: owner/name, owner/name:split or owner/name:config:split",
            hint="check the name, the config and the network; offline, give a local file (.jsonl, .parquet, …)",
        ) from error
    if not rows:
        raise DataError(f"{shown}: holds no rows", expected="at least one row")
    return Records(tuple((Where(shown, None, index), row) for index, row in enumerate(rows)), shown, digest)


def _plain(value: Any) -> str:
    """Write a value that JSON lacks (a date, bytes); raises TypeError for one whose text is not the same each time."""
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(f"a column of {type(value).__name__} has no stable text")
    return text
