"""Records of a table → rows of a task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peftkit.data.readers import Records, Where
from peftkit.data.tasks.columns import Columns, find_columns
from peftkit.data.tasks.problems import Problems
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskName, TaskRow
from peftkit.data.tasks.values import answers_of, label_of, labels_of, misplaced, number_of, tags_of, text_of, words_of

_EXPECTED: dict[TaskName, str] = {
    "text_classification": "a text and a label in every row",
    "regression": "a text and a finite number in every row",
    "token_classification": "words, and as many tags, in every row",
    "extractive_qa": "a context, a question and answers that stand in the context, in every row",
    "translation": "a source text and a target text in every row",
    "summarization": "a text and its summary in every row",
}


def rows_of(records: Records, spec: TaskSpec, *, labelled: bool) -> tuple[tuple[TaskRow, ...], Columns]:
    """Turn every record into a row. Raises DataError with all problems; no row is dropped."""
    records = _flat(records) if spec.task == "translation" else records
    columns = find_columns(records, spec, labelled=labelled)
    problems = Problems(records.source)
    rows = tuple(_row(where, record, columns, spec, problems) for where, record in records.records)
    problems.refuse(len(rows), _EXPECTED[spec.task])
    return rows, columns


def _row(where: Where, record: dict[str, Any], columns: Columns, spec: TaskSpec, problems: Problems) -> TaskRow:
    def cell(name: str | None, read: Callable[[Any], Any], otherwise: Any) -> Any:
        if name is None:
            return otherwise
        if name not in record:
            problems.add(where, f"the column {name!r} is missing")
            return otherwise
        try:
            return read(record[name])
        except ValueError as error:
            problems.add(where, f"{name}: {error}")
            return otherwise

    rest = {name: value for name, value in record.items() if name not in columns.used}
    if spec.task == "token_classification":
        words = cell(columns.text, words_of, ())
        tags = cell(columns.label, tags_of, None)
        if words and tags is not None and len(words) != len(tags):
            problems.add(where, f"{len(words)} words and {len(tags)} tags")
        return TaskRow(where, rest, words=words, target=tags)
    text = cell(columns.text, text_of, "")
    pair = cell(columns.pair, text_of, None)
    target = cell(columns.label, _reader(spec), None)
    if spec.task == "extractive_qa" and text:
        for answer in target or ():
            if (wrong := misplaced(answer, text)) is not None:
                problems.add(where, wrong)
    return TaskRow(where, rest, text, pair, target=target)


def _reader(spec: TaskSpec) -> Callable[[Any], Any]:
    """How the label's cell is read."""
    if spec.task == "text_classification":
        return partial(labels_of, separator=spec.separator) if spec.multi_label else label_of
    return {"regression": number_of, "extractive_qa": answers_of}.get(spec.task, text_of)


def _flat(records: Records) -> Records:
    """Records of one object per row, `{"translation": {"en": …, "de": …}}`, as their two columns."""
    if not all(isinstance(record.get("translation"), dict) for _, record in records.records):
        return records
    flat = ({**record, **record["translation"]} for _, record in records.records)
    bare = [{name: value for name, value in record.items() if name != "translation"} for record in flat]
    placed = tuple((where, record) for (where, _), record in zip(records.records, bare, strict=True))
    return Records(placed, records.source, records.sha256)
