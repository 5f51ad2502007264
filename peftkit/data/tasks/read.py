"""A file, two files or a folder → the rows of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftkit.data.readers import SUFFIXES, Records, read
from peftkit.data.tasks.columns import Columns
from peftkit.data.tasks.conll import read_conll, word_place
from peftkit.data.tasks.files import ending_of, read_headerless, read_text
from peftkit.data.tasks.parallel import halves, read_parallel
from peftkit.data.tasks.problems import Problems
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.squad import is_squad, read_squad
from peftkit.data.tasks.tables import rows_of
from peftkit.data.tasks.tags import read_tags
from peftkit.data.tasks.task import TaskRow
from peftkit.events import Report, silent

_TABLES = tuple(suffix for suffix in SUFFIXES if suffix not in (".txt", ".tsv"))


@dataclass(frozen=True)
class TaskDataset:
    """All rows of one source, in its order, and how they were read."""

    rows: tuple[TaskRow, ...]
    source: str
    sha256: str
    """Of the file's bytes; of several files over the digests of each."""
    reason: str
    """What was found and how it was read, in words."""
    label: str | None = None
    """The column of the labels, where there are columns."""


def read_rows(spec: TaskSpec, source: str, *, labelled: bool = True, report: Report = silent) -> TaskDataset:
    """Read the rows of a source for `spec.task`; without `labelled`, rows have no targets and need none.

    Raises DataError for a source that cannot be read whole, columns that are not found, and with every problem of
    single rows: file, line and reason. No row is dropped.
    """
    if spec.task == "image_classification":
        return _images(spec, source, labelled=labelled, report=report)
    if spec.task == "token_classification":
        return _tagged(spec, source, labelled=labelled)
    both = halves(source) if spec.task in ("translation", "summarization") else None
    if both is not None:
        rows, sha256 = read_parallel(*both, labelled=labelled)
        name = f"{both[0]}+{Path(both[1]).name}"
        return TaskDataset(rows, name, sha256, f"line n of {Path(both[1]).name} is the target of line n")
    records = _records(spec, source)
    if spec.task == "extractive_qa" and is_squad(records):
        rows = read_squad(records, labelled=labelled)
        none = sum(row.target == () for row in rows)
        reason = f"questions of {len(records.records):,} articles" + (f", {none:,} without an answer" if none else "")
        return TaskDataset(rows, records.source, records.sha256, reason)
    rows, columns = rows_of(records, spec, labelled=labelled)
    return TaskDataset(rows, records.source, records.sha256, _reason(rows, columns, spec), columns.label)


def _records(spec: TaskSpec, source: str) -> Records:
    return read_headerless(source, spec.columns) if spec.columns else read(source)


def _reason(rows: Sequence[TaskRow], columns: Columns, spec: TaskSpec) -> str:
    others = dict.fromkeys(name for row in rows for name in row.columns)
    kept = f"; other columns are kept beside the rows: {', '.join(map(repr, others))}" if others else ""
    return columns.reason(spec) + kept


def _tagged(spec: TaskSpec, source: str, *, labelled: bool) -> TaskDataset:
    """Words and tags from a table or a CoNLL file, the tags checked and rewritten as BIO."""
    table = _is_table(spec, source)
    label = None
    if table:
        records = _records(spec, source)
        (rows, columns), name, sha256 = rows_of(records, spec, labelled=labelled), records.source, records.sha256
        reason, label = _reason(rows, columns, spec), columns.label
    else:
        file = read_text(source)
        rows, name, sha256 = read_conll(file, source, labelled=labelled), source, file.sha256
        reason = f"CoNLL: {sum(len(row.words) for row in rows):,} words" + (
            ", the tag in the last column" if labelled else ""
        )
    if not labelled:
        return TaskDataset(rows, name, sha256, reason)
    read_as = read_tags([row.target for row in rows])
    problems = Problems(source)
    for at, word, wrong in read_as.broken:
        problems.add(word_place(rows[at], word, lines=not table), wrong)
    problems.refuse(len(rows), "tags in BIO: B- begins an entity, I- goes on with one of the same type, O is outside")
    said = {"plain": "tags without B- and I-", "BIO": "tags in BIO"}
    reason += f"; {said.get(read_as.scheme) or f'tags in {read_as.scheme}, rewritten as BIO'}"
    tagged = tuple(replace(row, target=tags) for row, tags in zip(rows, read_as.tags, strict=True))
    return TaskDataset(tagged, name, sha256, reason, label)


def _is_table(spec: TaskSpec, source: str) -> bool:
    """Whether tags stand in a table; a tsv file is one if its first line names the columns, and CoNLL otherwise."""
    ending = ending_of(source)
    if spec.columns or ending in _TABLES:
        return True
    if ending != ".tsv":
        return not Path(source).expanduser().exists()  # perhaps a set on the Hub; else the reader says what is near
    first = next(iter(read_text(source).lines), "").split("\t")
    named = {spec.text, spec.label} - {None} or {"tokens", "words", "tags", "ner_tags", "pos_tags"}
    return bool(named & set(first))


def _images(spec: TaskSpec, source: str, *, labelled: bool, report: Report) -> TaskDataset:
    """A folder of images, or a table of their paths."""
    from peftkit.data.tasks.images import images_sha256, read_image_table, read_images  # pillow: text does without it

    path = Path(source).expanduser()
    if ending_of(source) in (*_TABLES, ".tsv") and not path.is_dir():
        image, label = spec.text or "image", spec.label or "label"
        rows = read_image_table(path, image, label, labelled=labelled, report=report)
        reason, root = f"paths are in {image!r}, labels in {label!r}", path.parent
    else:
        rows = read_images(path, labelled=labelled, report=report)
        reason, root = "the label of an image is the name of its folder", path
    return TaskDataset(tuple(rows), source, images_sha256(root, rows), reason)
