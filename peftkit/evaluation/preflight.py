"""What can be known before training about how it will be measured: a typo must not cost the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.formats import Row
from peftkit.errors import DataError
from peftkit.evaluation.behaviour.probes import load_probes
from peftkit.evaluation.retention import load_text
from peftkit.evaluation.spec import EvaluateSpec


def preflight(spec: EvaluateSpec, rows: Sequence[Row], tokenizer: Tokenizer) -> None:
    """Raise DataError when held-out rows, retention text or instructions cannot be used the way `spec` asks."""
    if spec.group_by:
        check_column(spec.group_by, rows)
    if spec.retention:
        load_text(spec.retention, tokenizer, limit=1)
    read_instructions(spec.instructions)
    if spec.behaviour not in (None, "auto"):
        load_probes(spec.behaviour)
    if spec.metric == "json_fields":
        for row in rows[: spec.max_generated_rows]:
            _check_json(row)
    if spec.metric == "sql_execution":
        check_column("setup", rows, "evaluate.metric=sql_execution needs it")


def _check_json(row: Row) -> None:
    answer = str(row.messages[-1].get("content") or "") if row.messages else ""
    try:
        fine = isinstance(json.loads(answer), dict)
    except ValueError:
        fine = False
    if not fine:
        raise DataError(
            f"{row.where}: the answer is no JSON object, and evaluate.metric=json_fields compares fields",
            expected='an answer such as {"product": "lamp"}',
            hint="remove evaluate.metric, or choose exact_match",
        )


def check_column(column: str, rows: Sequence[Row], why: str | None = None) -> None:
    """Raise DataError when a row lacks a column."""
    missing = [str(row.where) for row in rows if column not in row.columns]
    if missing:
        known = sorted(rows[0].columns)
        raise DataError(
            f"{missing[0]} has no column {column!r}: " + (why or f"evaluate.group_by={column}"),
            expected="one of: " + ", ".join(known) if known else "rows with such a column",
        )


def read_instructions(given: str | None) -> str | None:
    """The text of `evaluate.instructions`, which is a file or the text itself.

    Raises DataError for a word that is neither.
    """
    if given is None:
        return None
    path = Path(given)
    try:
        is_file = path.is_file()
    except OSError:  # a text too long to be a file name
        is_file = False
    if is_file:
        return path.read_text(encoding="utf-8").strip()
    if "\n" not in given and " " not in given:
        raise DataError(
            f"evaluate.instructions={given} is neither a file nor a sentence",
            expected="a text file that exists, or the instructions themselves",
        )
    return given
