"""Image sets: a folder that holds one folder of images per class, or a table that names an image per row.

Every file is decoded once while the set is read; what cannot be used is an error that lists all such files. Hidden
files (and those that Windows and macOS leave behind) are skipped and counted. No image is dropped by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.data.formats import LISTED
from peftkit.data.readers import Where, read
from peftkit.data.tasks.picture import ENDINGS, check
from peftkit.data.tasks.task import TaskRow
from peftkit.errors import DataError
from peftkit.events import Note, Phase, Progress, Report, silent

_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
_STEP = 200  # images between two reports of progress


def read_images(source: Path, *, labelled: bool = True, report: Report = silent) -> list[TaskRow]:
    """Rows of a folder of class folders, by class and file name; unless `labelled`, of a folder of images.

    Raises DataError with every file that cannot be used.
    """
    source = source.expanduser()
    if not source.is_dir():
        raise DataError(f"{source}: is no folder", expected="a folder with one folder of images per class")
    found, problems = _class_images(source, report) if labelled else _images(source, report)
    rows = [
        TaskRow(Where(path.relative_to(source).as_posix(), None, index), image=path, target=label)
        for index, (path, label) in enumerate(found)
    ]
    problems += _undecodable(source, rows, report)
    if problems:
        raise _refusal(source, problems, len(rows))
    if not rows:
        expected = "one folder of images per class" if labelled else f"images: {', '.join(ENDINGS)}"
        raise DataError(f"{source}: holds no images", expected=expected)
    return rows


def read_image_table(
    source: Path, image: str = "image", label: str = "label", *, labelled: bool = True, report: Report = silent
) -> list[TaskRow]:
    """Rows of a csv, json, jsonl or parquet whose column `image` holds paths, relative to the file's own folder.

    The other columns stay with the row. Raises DataError with every row or image that cannot be used.
    """
    source = source.expanduser()
    needed = (image, label) if labelled else (image,)
    rows, problems = [], []
    for where, record in read(source).records:
        wrong = [f"{where}: {problem}" for column in needed if (problem := _cell_problem(record, column, image))]
        problems += wrong
        if not wrong:
            others = {key: value for key, value in record.items() if key not in needed}
            target = str(record[label]) if labelled else None
            rows.append(TaskRow(where, others, image=source.parent / str(record[image]), target=target))
    problems += _undecodable(source.parent, rows, report)
    if problems:
        raise _refusal(source, problems, len(rows))
    return rows


def images_sha256(root: Path, rows: Sequence[TaskRow]) -> str:
    """SHA-256 of an image set: each image's path below `root`, its label and its bytes, in the order of the rows."""
    digest = hashlib.sha256()
    for row in rows:
        if row.image is None:
            raise DataError(f"{row.where}: has no image", expected="rows of an image set")
        with row.image.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        name = Path(os.path.relpath(row.image, root.expanduser())).as_posix()
        line = json.dumps([name.encode("utf-8", "backslashreplace").decode(), row.target, content])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


Found = tuple[list[tuple[Path, str | None]], list[str]]
"""Images with their labels, and problems."""


def _class_images(source: Path, report: Report) -> Found:
    entries, skipped = _visible(source)
    found: list[tuple[Path, str | None]] = []
    problems, beside = [], []
    for entry in entries:
        if not entry.is_dir():
            beside.append(entry.name)
            if entry.suffix.lower() in ENDINGS:
                problems.append(f"{entry.name}: lies beside the class folders and has no label")
            continue
        images, hidden, wrong = _class_folder(entry)
        found += [(path, entry.name) for path in images]
        skipped += hidden
        problems += wrong
    _tell_skipped(source, skipped, beside, report)
    return found, problems


def _class_folder(folder: Path) -> tuple[list[Path], int, list[str]]:
    """Images of one class, how many hidden files it has, and what is wrong with it."""
    entries, hidden = _visible(folder)
    images = [entry for entry in entries if _is_image(entry)]
    wrong = []
    for entry in entries:
        name = f"{folder.name}/{entry.name}"
        if entry.is_dir():
            wrong.append(f"{name}: is a folder inside a class folder")
        elif not _is_image(entry):
            wrong.append(f"{name}: the ending {entry.suffix!r} is none of {', '.join(ENDINGS)}")
    if not entries:
        wrong.append(f"{folder.name}: is a class folder without images")
    return images, hidden, wrong


def _images(source: Path, report: Report) -> Found:
    entries, skipped = _visible(source)
    beside = [entry.name for entry in entries if not _is_image(entry)]
    _tell_skipped(source, skipped, beside, report)
    return [(entry, None) for entry in entries if _is_image(entry)], []


def _visible(folder: Path) -> tuple[list[Path], int]:
    """Entries of a folder by name, and how many hidden ones are not among them. Raises DataError."""
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    visible = [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in _SYSTEM_FILES]
    return visible, len(entries) - len(visible)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.is_dir()


def _tell_skipped(source: Path, hidden: int, beside: list[str], report: Report) -> None:
    others = [name for name in beside if Path(name).suffix.lower() not in ENDINGS]
    if hidden:
        report(Note(f"{source}: skipped {hidden:,} hidden files"))
    if others:
        report(Note(f"{source}: skipped what is no image: {_listed(others)}"))


def _undecodable(root: Path, rows: Sequence[TaskRow], report: Report) -> list[str]:
    """Decode every image once; what is wrong, by file."""
    report(Phase("decoding images", len(rows), "images"))
    problems, animated = [], []
    for done, row in enumerate(rows, start=1):
        path = row.image or root
        name = os.path.relpath(path, root)
        place = name if row.where.line is None and row.where.file == name else f"{row.where}: {name}"
        seen = check(path)
        if seen.problem:
            problems.append(f"{place}: {seen.problem}")
        elif seen.animated:
            animated.append(name)
        if done % _STEP == 0 or done == len(rows):
            report(Progress(done, {}))
    if animated:
        report(Note(f"the first frame stands for {len(animated):,} animated images: {_listed(animated)}"))
    return problems


def _cell_problem(record: dict[str, Any], column: str, image: str) -> str | None:
    if column not in record:
        return f"has no column {column!r}; it has {', '.join(map(repr, list(record)[:12])) or 'none'}"
    value = record[column]
    number = isinstance(value, int) and not isinstance(value, bool) and column != image
    if not number and not (isinstance(value, str) and value.strip()):
        return f"{column}: found {value!r:.80}, expected {'a path' if column == image else 'the name of a class'}"
    return None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _refusal(source: Path, problems: list[str], images: int) -> DataError:
    many = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    lines = [f"{source}: {many} in a set of {images:,} images", *(f"- {problem}" for problem in problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"- and {len(problems) - LISTED:,} more")
    hint = "mend or remove these files; peftkit drops none by itself"
    if all("inside a class folder" in problem for problem in problems):
        hint = f"name the folder whose folders are the classes, such as {source / problems[0].split('/')[0]}"
    return DataError(
        "\n".join(lines), expected="one folder of whole images per class, or rows that name them", hint=hint
    )
