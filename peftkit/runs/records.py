"""What a run wrote line by line: its figures step by step, and its events."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

HELD_OUT = "held_out_nll"
"""The figure that tells a measurement of the held-out rows from a step of training."""

_TAIL = 1 << 16  # bytes: some 300 steps, so that a list of runs reads no whole diaries


def read_metrics(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) of a run by step; torn lines are left out.

    A resumed run does some steps again. Of each step's training, and of each step's measurement of the held-out rows,
    the last record counts, so that the trace is that of a run that was never interrupted.
    """
    return _ordered(_lines(Path(run) / "metrics.jsonl"))


def last_figures(run: Path) -> dict[str, float]:
    """The figures of the newest training step, read from the end of the file; empty when there is none."""
    steps = _ordered(_lines(Path(run) / "metrics.jsonl", _TAIL))
    return next((figures for _, figures in reversed(steps) if HELD_OUT not in figures), {})


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run in the order written; torn lines are left out."""
    return _lines(Path(run) / "events.jsonl")


def _ordered(records: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    last: dict[tuple[int, bool], dict[str, float]] = {}
    for record in records:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            figures = {str(key): float(value) for key, value in record["figures"].items()}
            last[int(record["step"]), HELD_OUT in figures] = figures
    return [(step, last[step, measured]) for step, measured in sorted(last)]


def _lines(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; with `tail` those of its last so many bytes."""
    records = []
    try:
        with path.open("rb") as handle:
            if tail is not None:
                handle.seek(max(path.stat().st_size - tail, 0))
            lines = handle.read().split(b"\n")
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records
