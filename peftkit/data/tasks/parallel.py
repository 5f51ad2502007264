"""Two files of as many lines → rows of a source and a target text: `val.en.gz+val.de.gz`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from peftkit.data.readers import Where
from peftkit.data.tasks.files import read_text
from peftkit.data.tasks.problems import Problems
from peftkit.data.tasks.task import TaskRow
from peftkit.errors import DataError


def halves(source: str) -> tuple[str, str] | None:
    """The two files that a source names, or None for a source that names one; a name may itself hold a plus."""
    if "+" not in source or Path(source).expanduser().exists():
        return None
    cuts = [(source[:at], source[at + 1 :]) for at, char in enumerate(source) if char == "+"]
    both = [cut for cut in cuts if all(Path(part).expanduser().is_file() for part in cut)]
    return (both or cuts)[0]


def read_parallel(first: str, second: str, *, labelled: bool) -> tuple[tuple[TaskRow, ...], str]:
    """The rows and the SHA-256 over both files. Raises DataError for unequal counts and empty lines.

    Without `labelled` the targets are read and left out.
    """
    source, target = read_text(first), read_text(second)
    texts, translations = source.lines, target.lines
    if len(texts) != len(translations):
        raise DataError(
            f"{first} has {len(texts):,} lines and {second} has {len(translations):,}",
            expected="as many lines in both: line n of one is the translation of line n of the other",
            hint="look for a line that stands in one file only; peftkit cannot tell which it is",
        )
    problems = Problems(f"{first}+{second}")
    if not texts:
        problems.add(first, "holds no lines")
    rows = []
    for index, (text, translation) in enumerate(zip(texts, translations, strict=True)):
        for file, line in ((source, text), (target, translation)):
            if not line.strip():
                problems.add(f"{file.path.name}:{index + 1}", "the line is empty")
        where = Where(source.path.name, index + 1, index)
        rows.append(TaskRow(where, text=text, target=translation if labelled else None))
    problems.refuse(len(rows), "a text on every line of both files", "remove these lines from both files")
    return tuple(rows), hashlib.sha256(f"{source.sha256}\n{target.sha256}".encode()).hexdigest()
