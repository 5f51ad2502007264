"""The rows of a run, from one file or a mixture: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from peftkit.data import mixture
from peftkit.data.formats import Dataset, Row, load_rows
from peftkit.data.overlap import prompts
from peftkit.data.spec import DataSpec
from peftkit.data.split import split
from peftkit.errors import DataError
from peftkit.events import Note, Report, Table


@dataclass(frozen=True)
class Sides:
    """Both sides, each with where it comes from."""

    train: Sequence[Row]
    """Of a mixture one epoch: a row may stand here several times."""
    train_set: Dataset
    held_out: Sequence[Row]
    held_set: Dataset
    read: tuple[Dataset, ...]
    """All that was read, with the problems of each."""

    @property
    def distinct(self) -> Sequence[Row]:
        """The training rows, each once."""
        return list({id(row): row for row in self.train}.values()) if len(self.read) > 1 else self.train


def read_sides(spec: DataSpec, report: Report) -> Sides:
    """Read what the settings name, set rows aside where no held-out file is given, mix, and cut to the asked numbers.

    Raises DataError where there is nothing to read, a file cannot be read, or a side would be empty.
    """
    if not spec.mixture:
        return _cut(spec, _of_one(spec, report))
    return _cut(spec, _of_several(spec, report))


def _of_one(spec: DataSpec, report: Report) -> Sides:
    if spec.train is None:
        raise DataError(
            "data.train is not set", expected="a file of rows", hint="peftkit train … data.train=rows.jsonl"
        )
    train_set = load_rows(spec.train, spec.format, strict=False)
    report(Note(f"{train_set.source}: {len(train_set.rows)} rows, format {train_set.format} ({train_set.reason})"))
    train, held, held_set = divide(spec, train_set, report)
    return Sides(train, train_set, held, held_set, (train_set, held_set) if spec.held_out else (train_set,))


def _of_several(spec: DataSpec, report: Report) -> Sides:
    sets = [load_rows(source, spec.format, strict=False) for source in spec.mixture]
    weights = list(spec.mixture.values())
    whole = _as_one(sets, spec.mixture)
    if spec.held_out:
        held_set = _held_file(spec, report)
        parts: list[Sequence[Row]] = [one.rows for one in sets]
        held = held_set.rows
        read: tuple[Dataset, ...] = (*sets, held_set)
    else:
        parts, held_parts = _set_aside(sets, spec)
        held = tuple(mixture.mix(held_parts, [len(rows) for rows in held_parts], seed=spec.seed))
        report(Note(f"no data.held_out: {len(held)} rows set aside, of each set its share, with seed {spec.seed}"))
        held_set, read = whole, tuple(sets)
    train = mixture.mix(parts, weights, seed=spec.seed)
    taken = mixture.counts([len(rows) for rows in parts], weights)
    lines = zip(spec.mixture.items(), sets, parts, taken, strict=True)
    rows = tuple(
        (one.source, one.format, weight, len(rows), count, f"{count / len(rows):.2f}")
        for (_, weight), one, rows, count in lines
    )
    report(Table("mixture", ("set", "format", "weight", "rows to train on", "in an epoch", "times each"), rows))
    return Sides(train, whole, held, held_set, read)


def _cut(spec: DataSpec, sides: Sides) -> Sides:
    train, most = sides.train, spec.max_train_rows
    if most is not None:
        train = train[:most] if spec.draw is None else mixture.drawn(train, most, spec.draw)
    return Sides(train, sides.train_set, sides.held_out[: spec.max_held_out_rows], sides.held_set, sides.read)


def divide(spec: DataSpec, train_set: Dataset, report: Report) -> tuple[Sequence[Row], Sequence[Row], Dataset]:
    """Training rows, held-out rows and where the latter come from; a split is the same for the same file and seed."""
    if spec.held_out:
        held_set = _held_file(spec, report)
        return train_set.rows, held_set.rows, held_set
    keys = _by_row(train_set.rows)
    parts = split(train_set.rows, spec.held_out_share, spec.seed, key=lambda row: keys[id(row)])
    report(Note(f"no data.held_out: {len(parts.held_out)} rows set aside with seed {spec.seed}"))
    return parts.train, parts.held_out, train_set


def _held_file(spec: DataSpec, report: Report) -> Dataset:
    assert spec.held_out is not None  # the callers' check
    held_set = load_rows(spec.held_out, spec.format, strict=False)
    report(Note(f"{held_set.source}: {len(held_set.rows)} held-out rows, format {held_set.format}"))
    return held_set


def _set_aside(sets: Sequence[Dataset], spec: DataSpec) -> tuple[list[Sequence[Row]], list[Sequence[Row]]]:
    """Both sides of every set: what is held out of one is in no other's training rows, even where both have it."""
    keys = _by_row([row for one in sets for row in one.rows])
    split_apart = [split(one.rows, spec.held_out_share, spec.seed, key=lambda row: keys[id(row)]) for one in sets]
    held = {keys[id(row)] for parts in split_apart for row in parts.held_out}
    train: list[Sequence[Row]] = [[row for row in one.rows if keys[id(row)] not in held] for one in sets]
    empty = [one.source for one, rows in zip(sets, train, strict=True) if not rows]
    if empty:
        raise DataError(
            f"nothing of {', '.join(empty)} is left to train on: the other sets' held-out rows are all it has",
            expected="sets that differ",
            hint="name rows to measure on: data.held_out=…",
        )
    return train, [[row for row in one.rows if keys[id(row)] in held] for one in sets]


def _as_one(sets: Sequence[Dataset], weights: Mapping[str, float]) -> Dataset:
    rows = tuple(chain.from_iterable(one.rows for one in sets))
    formats = ", ".join(dict.fromkeys(one.format for one in sets))
    sha256 = mixture.digest([one.sha256 for one in sets], list(weights.values()))
    return Dataset(rows, formats, "mixed", mixture.name(weights), sha256)


def _by_row(rows: Sequence[Row]) -> dict[int, str]:
    return dict(zip(map(id, rows), _split_keys(rows), strict=True))


def _split_keys(rows: Sequence[Row]) -> list[str]:
    """What keeps rows on one side of the split: their content; rows with one question share the least of theirs.

    A question with several answers would otherwise stand on both sides: in e2e_nlg, behind every held-out row.
    """
    contents = [repr((row.messages, row.text)) for row in rows]
    questions = [prompt or content for prompt, content in zip(prompts(rows), contents, strict=True)]
    if len(set(questions)) < 2:
        return contents
    least: dict[str, str] = {}
    for question, content in zip(questions, contents, strict=True):
        least[question] = min(content, least.get(question, content))
    return [least[question] for question in questions]
