"""The rows of a run of a task: what is trained on, what is held out, and the head that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from peftkit.base.head import Head
from peftkit.data import mixture
from peftkit.data.augment import augment
from peftkit.data.tasks.contents import split_keys, stratum
from peftkit.data.tasks.heads import check_rows, head_of, kind_of
from peftkit.data.tasks.problems import all_or_refuse
from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.strata import draw_balanced, set_aside
from peftkit.data.tasks.task import TaskRow
from peftkit.errors import ConfigError, DataError
from peftkit.events import Note, Report

_HELD_OUT = "held out"  # the seed of that draw: no setting changes what is measured on


@dataclass(frozen=True)
class Sides:
    """Both sides, each with where it comes from."""

    head: Head
    train: tuple[TaskRow, ...]
    """Of a mixture one epoch: a row may stand here several times; then the edited copies."""
    written: tuple[TaskRow, ...]
    """The training rows as their authors wrote them, each once."""
    train_set: TaskDataset
    held_out: tuple[TaskRow, ...]
    held_set: TaskDataset


def read_sides(spec: TaskSpec, report: Report, head: Head | None) -> Sides:
    """Read what the settings name, set rows aside where no held-out file is given, mix, draw, and make edited copies.

    The head is that of all rows in the training files, so that no draw of few rows loses a label. Raises ConfigError
    for settings that do not go together, DataError for rows that cannot be used and labels that the head does not have.
    """
    _check_settings(spec)
    names = list(spec.mixture) or [spec.train or ""]
    sources = [*names, spec.held_out] if spec.held_out else names
    attempts: list[Callable[[], TaskDataset]] = [partial(read_rows, spec, name, report=report) for name in sources]
    read = all_or_refuse(*attempts)
    for one in read:
        report(Note(f"{one.source}: {len(one.rows):,} rows; {one.reason}"))
    sets, held_set = read[: len(names)], read[len(names)] if spec.held_out else None
    whole = _as_one(sets, spec)
    head = _head(spec, whole, held_set, head)
    parts, held_out = _apart(spec, sets, held_set, report)
    epoch = mixture.mix(parts, list(spec.mixture.values()), seed=spec.seed) if spec.mixture else parts[0]
    chosen = _drawn(spec, epoch, report)
    if spec.max_held_out_rows is not None:
        held_out = mixture.drawn(held_out, spec.max_held_out_rows, _HELD_OUT)
    train, counts = augment(chosen, spec.augment, spec.task, held_out=held_out)
    if spec.augment.times:
        report(Note(f"data.augment: {counts['copies']:,} edited copies of {counts['rows']:,} rows"))
    written = tuple({id(row): row for row in chosen}.values())
    return Sides(head, tuple(train), written, whole, tuple(held_out), held_set or whole)


def _check_settings(spec: TaskSpec) -> None:
    problems = []
    if spec.train is None and not spec.mixture:
        problems.append("data.train is not set: name a file of rows, data.train=rows.jsonl")
    if spec.multi_label and spec.task != "text_classification":
        problems.append(f"data.multi_label is for text_classification, not for {spec.task}")
    if spec.balance and (spec.multi_label or spec.task not in ("text_classification", "image_classification")):
        problems.append("data.balance needs rows of one label each")
    if spec.balance and spec.max_train_rows is None:
        problems.append("data.balance does nothing without data.max_train_rows")
    if problems:
        raise ConfigError(problems)


def _head(spec: TaskSpec, whole: TaskDataset, held_set: TaskDataset | None, given: Head | None) -> Head:
    """The head of the rows, or the given one if it fits them."""
    if given is None:
        head = head_of(spec, whole.rows, column=whole.label)
        if held_set is not None:
            check_rows(head, held_set.rows, held_set.source, "the training rows")
        return head
    if (given.kind, given.problem) != kind_of(spec):
        fact = f"the adapter has a {given.kind} head ({given.problem}), and {spec.task} asks for {kind_of(spec)}"
        raise DataError(fact, expected="rows of the adapter's own task", hint="choose that task's recipe")
    sets = [one for one in (whole, held_set) if one is not None]
    all_or_refuse(*(partial(check_rows, given, one.rows, one.source, "the adapter's head") for one in sets))
    return given


def _apart(
    spec: TaskSpec, sets: Sequence[TaskDataset], held_set: TaskDataset | None, report: Report
) -> tuple[list[Sequence[TaskRow]], Sequence[TaskRow]]:
    """Training rows of every set, and the held-out rows: those of the file, or a share of every set."""
    if held_set is not None:
        return [one.rows for one in sets], held_set.rows
    rows = [row for one in sets for row in one.rows]
    labelled = kind_of(spec)[0] != "seq2seq"  # there the targets are texts
    strata = [f"{at}\0{stratum(row) if labelled else ''}" for at, one in enumerate(sets) for row in one.rows]
    held = set_aside(split_keys(rows, spec.task), strata, spec.held_out_share, spec.seed)
    parts, begun = [], 0
    for one in sets:
        parts.append([row for at, row in enumerate(one.rows, start=begun) if at not in held])
        begun += len(one.rows)
    report(Note(f"no data.held_out: {len(held):,} rows set aside with seed {spec.seed}, of every label its share"))
    return list(parts), [row for at, row in enumerate(rows) if at in held]


def _drawn(spec: TaskSpec, rows: Sequence[TaskRow], report: Report) -> Sequence[TaskRow]:
    if spec.max_train_rows is None:
        return rows
    if not spec.balance:
        return mixture.drawn(rows, spec.max_train_rows, spec.draw)
    chosen = draw_balanced(rows, spec.max_train_rows, spec.draw)
    if len(chosen) < spec.max_train_rows:
        report(
            Note(
                f"data.balance: {len(chosen):,} training rows, the most up to {spec.max_train_rows:,} with as many each"
            )
        )
    return chosen


def _as_one(sets: Sequence[TaskDataset], spec: TaskSpec) -> TaskDataset:
    """All that there is to train on as one set; a row of a mixture says which file it is from."""
    if not spec.mixture:
        return sets[0]
    rows = tuple(row for one in sets for row in one.rows)
    sha256 = mixture.digest([one.sha256 for one in sets], list(spec.mixture.values()))
    return replace(sets[0], rows=rows, source=mixture.name(spec.mixture), sha256=sha256, reason="mixed")
