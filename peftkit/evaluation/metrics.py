"""Scores of one generated answer against its reference, each in [0, 1], and their sums.

All metrics are strict: an answer that a program could not use as it is does not count, and `detail` says why.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from peftkit.errors import DataError
from peftkit.evaluation import sqlite

FENCED_ATTEMPTS = 10
"""Opening braces at which an object inside other text is looked for; only the wording of a detail depends on it."""


@dataclass(frozen=True)
class FieldCount:
    """How often one field was right, invented, missed, or rightly left out (null or absent in both)."""

    true_positive: int = 0
    false_positive: int = 0
    false_negative: int = 0
    true_negative: int = 0

    def __add__(self, other: FieldCount) -> FieldCount:
        return FieldCount(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
            self.true_negative + other.true_negative,
        )

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP) in [0, 1], None if the field was never predicted."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN) in [0, 1], None if no reference has the field."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN) in [0, 1], the harmonic mean of both; None if the field never occurs."""
        twice = 2 * self.true_positive
        return _ratio(twice, twice + self.false_positive + self.false_negative)


@dataclass(frozen=True)
class Score:
    """The value in [0, 1] of one answer, the counts per field where the metric has fields, and what went wrong."""

    value: float
    fields: dict[str, FieldCount] | None = None
    detail: str | None = None


Metric = Callable[[str, str, Mapping[str, Any]], Score]
"""prediction, reference, the row's other columns → Score; raises DataError for a reference that cannot be used."""


def exact_match(prediction: str, reference: str, columns: Mapping[str, Any]) -> Score:
    """1 if both are the same characters once outer whitespace is trimmed, else 0.

    Case, punctuation and inner blanks count; nothing is normalised.
    """
    return Score(float(prediction.strip() == reference.strip()))


def json_fields(prediction: str, reference: str, columns: Mapping[str, Any]) -> Score:
    """1 if both are the same JSON object, else 0, with counts for each top-level field.

    Objects are the same with the same keys and values, in whatever order of keys; true is not 1, "1" is not 1, and 1.0
    is 1 (JSON has one kind of number). A wrong value is one false positive and one false negative (as in slot filling);
    null means "not there", so that a rightly empty field is a true negative, though null and a missing key still make
    two different objects. Nothing around the object is forgiven: prose, code fences, a key given twice and NaN make the
    prediction invalid and each field of the reference missed. Raises DataError if the reference is no such object.
    """
    try:
        expected = _parse(reference)
    except ValueError as error:
        raise DataError(
            f"{_where(reference, columns)}: the reference is not a JSON object: {error}",
            expected="one JSON object with distinct keys",
            hint="mend the reference, or choose another metric",
        ) from error
    try:
        given = _parse(prediction)
    except ValueError as error:
        missed = {name: FieldCount(false_negative=1) for name, value in expected.items() if value != "null"}
        return Score(0.0, missed, str(error))
    fields = {name: _count(expected.get(name), given.get(name)) for name in sorted({*expected, *given})}
    return Score(float(given == expected), fields, _difference(expected, given))


def sql_execution(prediction: str, reference: str, columns: Mapping[str, Any]) -> Score:
    """1 if both queries give the same rows on an in-memory SQLite built from the column `setup`, else 0.

    Order counts only if the reference has an ORDER BY; see `sqlite.judge` for what is the same and what is allowed. One
    database can agree by accident. Raises DataError, naming the row, for a missing or failing setup or reference.
    """
    setup = columns.get("setup")
    where = _where(reference, columns)
    if not isinstance(setup, str):
        raise DataError(
            f"{where} has no column `setup`",
            expected="SQL that creates and fills the tables of the query",
            hint="add a `setup` column, or choose another metric",
        )
    verdict = sqlite.judge(setup, reference, prediction, where=where)
    return Score(float(verdict.same), detail=verdict.detail)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "json_fields": json_fields,
    "sql_execution": sql_execution,
}


def choose(references: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The name of the metric that fits all rows, and the reason in words.

    Raises DataError for no rows, or a number of references that differs from that of columns.
    """
    rows = len(references)
    if rows == 0 or rows != len(columns):
        raise DataError(
            f"{rows} reference answers and {len(columns)} rows of columns", expected="the same number, at least one"
        )
    objects = sum(_is_object(reference) for reference in references)
    if objects == rows:
        return "json_fields", f"all {rows} reference answers are JSON objects"
    setups = sum(isinstance(row.get("setup"), str) for row in columns)
    if setups == rows:
        return "sql_execution", f"all {rows} rows have a column `setup`"
    return "exact_match", f"of {rows} reference answers {objects} are JSON objects, {setups} have a column `setup`"


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """The sums over all rows, ready for JSON: `n`, `mean`, and `fields`, `micro_f1`, `macro_f1` (None without fields).

    Micro F1 adds up the counts of all fields first; macro F1 is the plain mean over the fields that occur. Raises
    DataError for no scores.
    """
    totals: dict[str, FieldCount] = {}
    for score in scores:
        for name, count in (score.fields or {}).items():
            totals[name] = totals.get(name, FieldCount()) + count
    defined = [f1 for count in totals.values() if (f1 := count.f1) is not None]
    return {
        "n": len(scores),
        "mean": _mean(scores),
        "fields": {name: _describe(totals[name]) for name in sorted(totals)} or None,
        "micro_f1": sum(totals.values(), FieldCount()).f1,
        "macro_f1": math.fsum(defined) / len(defined) if defined else None,
    }


def by_group(scores: Sequence[Score], groups: Sequence[str]) -> list[tuple[str, int, float]]:
    """(group, number of rows, mean value) sorted by group; raises DataError unless each score has its group."""
    if len(scores) != len(groups):
        raise DataError(f"{len(groups)} groups for {len(scores)} scores", expected="one group for each score")
    members: dict[str, list[Score]] = {}
    for score, group in zip(scores, groups, strict=True):
        members.setdefault(group, []).append(score)
    return [(group, len(members[group]), _mean(members[group])) for group in sorted(members)]


def _mean(scores: Sequence[Score]) -> float:
    if not scores:
        raise DataError("there are no scores", expected="at least one")
    return math.fsum(score.value for score in scores) / len(scores)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _describe(count: FieldCount) -> dict[str, float | None]:
    return {
        "precision": count.precision,
        "recall": count.recall,
        "f1": count.f1,
        "true_positive": count.true_positive,
        "false_positive": count.false_positive,
        "false_negative": count.false_negative,
        "true_negative": count.true_negative,
    }


def _where(reference: str, columns: Mapping[str, Any]) -> str:
    """A name for the row: its `id`, or the beginning of its reference answer."""
    if "id" in columns:
        return f"row {columns['id']}"
    return f"the row with the reference {reference if len(reference) <= 60 else reference[:59] + '…'!r}"


def _count(expected: str | None, given: str | None) -> FieldCount:
    """One field of one row, each side as canonical JSON or None if the key is absent."""
    wanted, found = expected not in (None, "null"), given not in (None, "null")
    if not wanted and not found:
        return FieldCount(true_negative=1)
    if expected == given:
        return FieldCount(true_positive=1)
    return FieldCount(false_positive=int(found), false_negative=int(wanted))


def _difference(expected: Mapping[str, str], given: Mapping[str, str]) -> str | None:
    parts = (
        ("missing", [name for name in expected if name not in given]),
        ("not asked for", [name for name in given if name not in expected]),
        ("wrong", [name for name in expected if name in given and given[name] != expected[name]]),
    )
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or None


def _is_object(text: str) -> bool:
    try:
        _parse(text)
    except ValueError:
        return False
    return True


def _parse(text: str) -> dict[str, str]:
    """Each top-level key of a JSON object with its value as canonical JSON; raises ValueError saying what is wrong."""
    try:
        value = _DECODER.decode(text)
        if isinstance(value, dict):
            return {key: json.dumps(part, sort_keys=True) for key, part in value.items()}
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"JSON inside other text: {place}" if _holds_object(text) else place) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    raise ValueError(f"a JSON {'list' if isinstance(value, list) else 'value'}, not an object")


def _holds_object(text: str) -> bool:
    start = -1
    for _ in range(FENCED_ATTEMPTS):
        start = text.find("{", start + 1)
        if start < 0:
            return False
        try:
            _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return True
    return False


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return keys


def _number(text: str) -> float | int:
    """A JSON number with a point or an exponent; an integral one becomes an int, so that 1.0 is written as 1 is."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]} is out of range")
    return int(number) if number.is_integer() else number


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=_number, parse_constant=_refuse)
