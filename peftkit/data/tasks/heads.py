"""The head that the labels of training rows ask for, and rows that do not fit it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence

from peftkit.base.head import NO_ANSWER, Head, HeadKind, Problem
from peftkit.data.tasks.problems import Problems, shown
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.tags import tag_names
from peftkit.data.tasks.task import TaskName, TaskRow
from peftkit.errors import DataError

_KINDS: dict[TaskName, HeadKind] = {
    "text_classification": "sequence",
    "regression": "sequence",
    "token_classification": "token",
    "extractive_qa": "span",
    "image_classification": "image",
    "translation": "seq2seq",
    "summarization": "seq2seq",
}


def head_of(spec: TaskSpec, rows: Sequence[TaskRow], *, column: str | None = None) -> Head:
    """The head of a task: labels sorted, those that are all numbers by their value; tags O, B-x, I-x by type.

    `column` is the name of a regression's number. Raises DataError where all rows have the same label, number or tag.
    """
    kind, problem = kind_of(spec)
    labels: tuple[str, ...] = ()
    if kind == "span":
        return Head(kind, (NO_ANSWER,) if any(row.target == () for row in rows) else (), problem)
    if problem == "regression":
        distinct = {row.target for row in rows}
        if len(distinct) < 2:
            raise _alone(rows, shown(next(iter(distinct), None)), "number")
        return Head(kind, (column or spec.label or "number",), problem)
    if kind in ("sequence", "token", "image"):
        names = {label for row in rows for label in labels_in(row.target)}
        labels = tag_names(names) if kind == "token" else _sorted(names)
        if len(labels) < (1 if problem == "multi_label" else 2):
            raise _alone(rows, shown(labels[0]) if labels else "none", "tag" if kind == "token" else "label")
        if problem == "multi_label" and len({frozenset(row.target) for row in rows}) < 2:
            raise _alone(rows, ", ".join(labels), "labels")
    return Head(kind, labels, problem)


def kind_of(spec: TaskSpec) -> tuple[HeadKind, Problem]:
    """The kind of head that a task needs, and what its labels are."""
    if spec.task == "regression":
        return "sequence", "regression"
    return _KINDS[spec.task], "multi_label" if spec.multi_label else "single_label"


def labels_in(target: object) -> Iterator[str]:
    """The labels or tags that a target names; none of numbers, answers and texts to write."""
    if isinstance(target, str):
        yield target
    elif isinstance(target, tuple):
        yield from (label for label in target if isinstance(label, str))


def check_rows(head: Head, rows: Sequence[TaskRow], source: str, learned_from: str) -> None:
    """Raise DataError that lists every row with a label that the head has no output for."""
    if not head.labels or head.problem == "regression" or head.kind == "span":
        return
    problems = Problems(source)
    known = set(head.labels)
    for row in rows:
        for label in dict.fromkeys(labels_in(row.target)):
            if label not in known:
                near = difflib.get_close_matches(label, head.labels, n=1, cutoff=0.7)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                problems.add(row.where, f"the label {shown(label)} is not in {learned_from}{meant}")
    names = ", ".join(map(repr, head.labels[:12])) + (f" and {len(head.labels) - 12} more" if head.labels[12:] else "")
    problems.refuse(len(rows), f"one of {names}", "spell it as in training, add such rows there, or remove these")


def _sorted(names: set[str]) -> tuple[str, ...]:
    """Names in their order: by value where every one is a number."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    if not all(map(math.isfinite, numbers.values())):
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: (numbers[name], name)))


def _alone(rows: Sequence[TaskRow], what: str, kind: str) -> DataError:
    source = rows[0].where.file if rows else "no rows"
    return DataError(
        f"{source}: all {len(rows):,} rows have the same {kind}: {what}",
        expected=f"at least two: with one {kind} there is nothing to tell apart",
        hint="add rows of other kinds, or check that data.label names the right column",
    )
