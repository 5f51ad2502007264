"""Files read as lines: text that is no table, and tables that have no header line."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The same refusals as for tables, word for word: of missing files, broken gzip, other encodings and broken quotes.
from peftkit.data.readers import Records, Where, _decode, _gunzip, _must_be_file, _numbered
from peftkit.errors import DataError


@dataclass(frozen=True)
class TextFile:
    """The text of a file and the SHA-256 of its bytes."""

    path: Path
    text: str
    sha256: str

    @property
    def lines(self) -> list[str]:
        """Its lines without their ends; what follows the last line end is a line only if it is not empty."""
        lines = self.text.split("\n")
        return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_text(source: str) -> TextFile:
    """Read a file as UTF-8, unzipped where its name ends with .gz. Raises DataError where it cannot be."""
    path = Path(source).expanduser()
    _must_be_file(path, source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    return TextFile(path, _decode(_gunzip(data, source) if path.suffix.lower() == ".gz" else data, source), digest)


def read_headerless(source: str, columns: Sequence[str]) -> Records:
    """The rows of a csv or tsv file without a header line, under the names `columns`.

    Raises DataError for another ending, a row with another number of cells, or an empty file.
    """
    if len(set(columns)) != len(columns):
        raise DataError(f"data.columns={list(columns)} names a column twice", expected="distinct names")
    ending = ending_of(source)
    if ending not in (".csv", ".tsv"):
        fact = f"{source}: data.columns names the columns of csv and tsv files, and this one ends with {ending!r}"
        raise DataError(fact, hint="leave data.columns out: other files name their columns themselves")
    file = read_text(source)
    reader = csv.reader(io.StringIO(file.text, newline=""), delimiter="\t" if ending == ".tsv" else ",", strict=True)
    limit = csv.field_size_limit(max(len(file.text), csv.field_size_limit()))
    try:
        rows = list(_numbered(reader, source))
    finally:
        csv.field_size_limit(limit)
    for line, cells in rows:
        if len(cells) != len(columns):
            fact = f"{source}:{line}: {len(cells)} cells where data.columns has {len(columns)}: {cells!r:.80}"
            raise DataError(fact, expected=f"the cells {', '.join(columns)}", hint="name every column in its order")
    if not rows:
        raise DataError(f"{source}: holds no rows", expected="at least one row")
    records = tuple(
        (Where(file.path.name, line, index), dict(zip(columns, cells, strict=True)))
        for index, (line, cells) in enumerate(rows)
    )
    return Records(records, source, file.sha256)


def ending_of(source: str) -> str:
    """The ending that tells a file's kind, in lower case and without .gz."""
    path = Path(source)
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
