"""A file as rows of the kind that adapters were trained on, and else as conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.data.formats import Dataset, load_rows
from peftkit.data.preference.rows import PreferenceSet, load_preferences
from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.errors import DataError
from peftkit.evaluation.registered.recorded import (
    OF_ROWS,
    Kind,
    kind_of,
    preference_settings,
    task_settings,
    with_options,
)
from peftkit.events import Note, Report, silent
from peftkit.registry.store import Version

Rows = Dataset | TaskDataset | PreferenceSet
"""Conversations; sources and targets; preferences."""
_WORDS = {"texts": "sources and the texts wanted", "pairs": "pairs of answers", "labelled": "labelled answers"}


def read_as_trained(
    versions: Sequence[Version], source: str, asked: Mapping[str, Any], *, report: Report = silent
) -> Rows:
    """Read a file for adapters without a head, as what they were trained on; `asked` are columns of another file.

    What cannot be read so and holds conversations is taken as these, and a note says it; not with columns of its own.
    Raises DataError for what is neither, and where the adapters were not trained on rows of one kind.
    """
    first = {kind_of(version): version for version in reversed(versions)}
    found: dict[Kind, Rows] = {
        kind: _read(version, source, asked, report) for kind, version in first.items() if kind != "head"
    }
    if len({type(rows) for rows in found.values()}) > 1:
        listed = "; ".join(f"{version.reference}: {_WORDS.get(kind, kind)}" for kind, version in first.items())
        raise DataError(
            f"{source} would be read in different ways, as what each adapter was trained on: {listed}",
            expected="adapters that were trained on rows of one kind",
            hint="evaluate them one by one",
        )
    return found[kind_of(versions[0])]


def _read(version: Version, source: str, asked: Mapping[str, Any], report: Report) -> Rows:
    kind = kind_of(version)
    if kind == "conversations":
        return load_rows(source)
    try:
        rows: TaskDataset | PreferenceSet
        if kind == "texts":
            rows = read_rows(task_settings(version, **asked), source, report=report)
            said = rows.reason
        else:
            rows = load_preferences(source, preference_settings(version, **asked).kind)
            said = f"format {rows.format} ({rows.reason})"
    except DataError as error:
        told = with_options(error)
        if any(asked.get(name) for name in OF_ROWS):
            raise told from None
        return _as_conversations(version, source, told, report)
    report(Note(f"{rows.source}: {len(rows.rows):,} rows; {said}"))
    return rows


def _as_conversations(version: Version, source: str, error: DataError, report: Report) -> Dataset:
    """The file's conversations, and a note of why it is not read as training read its own; else that error."""
    try:
        rows = load_rows(source)
    except DataError:
        raise error from None
    trained = f"{version.reference} was trained on {_WORDS[kind_of(version)]}"
    how = "each answer as it stands, asked as the row says"
    report(Note(f"measured on conversations ({how}): {trained}, and as these the rows cannot be read: {error.fact}"))
    return rows
