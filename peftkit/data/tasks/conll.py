"""CoNLL files → rows of words and tags: a word a line, its tag in the last column, a blank line between sentences."""

from __future__ import annotations

import re
from dataclasses import replace

from peftkit.data.readers import Where
from peftkit.data.tasks.files import TextFile
from peftkit.data.tasks.problems import Problems, shown
from peftkit.data.tasks.task import TaskRow

_SPACES = re.compile(r"[ \t]+")
_DOCUMENT = "-DOCSTART-"


def read_conll(file: TextFile, source: str, *, labelled: bool) -> tuple[TaskRow, ...]:
    """The sentences of a file, `where` being the line of their first word. Raises DataError with all problems.

    Columns are separated by tabs, in lines without one by spaces. Lines that begin with -DOCSTART- are skipped. Without
    `labelled` a line may hold the word alone, and what else it holds is not read.
    """
    problems = Problems(source)
    rows: list[TaskRow] = []
    words: list[str] = []
    tags: list[str] = []
    width = first = total = 0
    for number, line in enumerate([*file.lines, ""], start=1):
        if line.startswith(_DOCUMENT):
            continue
        if not line.strip(" \t"):
            if words:
                where = Where(file.path.name, first, len(rows))
                rows.append(TaskRow(where, words=tuple(words), target=tuple(tags) if labelled else None))
            words, tags = [], []
            continue
        cells = line.split("\t") if "\t" in line else _SPACES.split(line.strip(" "))
        total += 1
        width = width or len(cells)
        first = first if words else number
        words.append(cells[0])
        tags.append(cells[-1].strip(" "))
        if (wrong := _wrong(cells, width, labelled)) is not None:
            problems.add(Where(file.path.name, number, len(rows)), wrong)
    expected = "a word and its tag on every line, in as many columns everywhere" if labelled else "a word on every line"
    if not rows:
        problems.add(file.path.name, "holds no words")
    problems.refuse(total, expected, "edit these lines; a blank line ends a sentence")
    return tuple(rows)


def _wrong(cells: list[str], width: int, labelled: bool) -> str | None:
    if not cells[0].strip():
        return "there is no word before the tag"
    if not labelled:
        return None
    if len(cells) < 2:
        return f"the word {shown(cells[0])} has no tag"
    if not cells[-1].strip(" "):
        return f"the tag of {shown(cells[0])} is empty"
    return f"{len(cells)} columns where the first line has {width}" if len(cells) != width else None


def word_place(row: TaskRow, word: int, *, lines: bool) -> str:
    """Where a word stands: its own line in CoNLL files, the row and the word elsewhere."""
    if lines and row.where.line is not None:
        return str(replace(row.where, line=row.where.line + word))
    return f"{row.where}, word {word + 1}"
