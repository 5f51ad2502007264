"""The rows of docs/decisions/0018: sst2 and ag_news of the folder PEFTKIT_TEST_DATA, encoded once."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data.mixture import drawn
from peftkit.data.tasks.task import TaskExample

LABELS = {"sst2": ("negative", "positive"), "ag_news": ("World", "Sports", "Business", "Sci/Tech")}
TEST, VALIDATION = 1000, 500
LONGEST = 64
Pair = tuple[str, int]
"""A text, and the index of its label."""


@dataclass(frozen=True)
class Rows:
    """Encoded rows of one data set; no text stands in it twice."""

    pool: tuple[TaskExample, ...]
    """What training draws from."""
    validation: tuple[TaskExample, ...]
    test: tuple[TaskExample, ...]
    sha256: str
    """Of the files' bytes."""

    def draw(self, n: int, seed: int) -> list[TaskExample]:
        """n training rows; those of a smaller n are among those of a larger one."""
        return drawn(self.pool, n, seed)


def folder() -> Path:
    """The folder of data; exits where PEFTKIT_TEST_DATA names none."""
    found = Path(os.environ.get("PEFTKIT_TEST_DATA", ""))
    if not (found / "sst2" / "train.tsv").is_file() or not (found / "ag_news" / "test.csv").is_file():
        raise SystemExit("set PEFTKIT_TEST_DATA to a folder with sst2 and ag_news")
    return found


def parts(data: str, place: Path) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Training, validation and test rows before any draw, each text once."""
    if data == "sst2":
        files = {name: list(_sst2(place / "sst2" / f"{name}.tsv")) for name in ("train", "dev", "test")}
        test = drawn(_without(files["test"], []), TEST, "test")
        validation = drawn(_without(files["dev"], test), VALIDATION, "validation")
        return _without(files["train"], [*test, *validation]), validation, test
    rows = _without(list(_ag_news(place / "ag_news" / "test.csv")), [])
    held = drawn(rows, TEST + VALIDATION, "held out")
    test = drawn(held, TEST, "test")
    return _without(rows, held), _without(held, test), test


def load(data: str, tokenizer: Any) -> Rows:
    """Read, split and encode a data set."""
    place = folder()
    pool, validation, test = parts(data, place)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted((place / data).glob("*.[tc]sv")))).hexdigest()
    encoded = [tuple(_encoded(part, tokenizer)) for part in (pool, validation, test)]
    return Rows(encoded[0], encoded[1], encoded[2], digest)


def _sst2(file: Path) -> Iterator[Pair]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            text, label = line.rsplit("\t", 1)
            yield text, int(label)


def _ag_news(file: Path) -> Iterator[Pair]:
    with file.open(encoding="utf-8", newline="") as lines:
        for label, title, text in csv.reader(lines):
            yield f"{title}. {text}", int(label) - 1


def _without(rows: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """Rows whose text is not that of another row, each text once; the first of those that differ in their label."""
    seen, first = {text for text, _ in others}, dict[str, Pair]()
    for row in rows:
        first.setdefault(row[0], row)
    return [row for text, row in first.items() if text not in seen]


def _encoded(rows: Sequence[Pair], tokenizer: Any) -> Iterator[TaskExample]:
    found = tokenizer([text for text, _ in rows], truncation=True, max_length=LONGEST)
    for at, (_, label) in enumerate(rows):
        kinds = tuple(found["token_type_ids"][at]) if "token_type_ids" in found else None
        yield TaskExample(found["input_ids"][at], (label,), at, f"row {at}", kinds)
