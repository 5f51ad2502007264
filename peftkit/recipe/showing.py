"""A comparison the way every command shows it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftkit.events import Note, Report, Table
from peftkit.render import interval, number

if TYPE_CHECKING:
    from peftkit.evaluation.compare import Interval
    from peftkit.evaluation.held_out import Comparison


def report_comparison(comparison: Comparison, report: Report) -> None:
    """Report a comparison the way every command shows it."""
    from peftkit.evaluation.held_out import COLUMNS

    report(Table("held-out rows", COLUMNS, tuple(comparison.rows())))
    learned = comparison.learned
    report(Note(f"answer NLL per token, adapter − base: {_shown(learned)}"))
    forgotten = comparison.forgotten
    if forgotten is not None:
        report(Note(f"general text NLL per token, adapter − base: {_shown(forgotten)} (above 0: forgotten)"))
    if comparison.spec.group_by and comparison.adapter.scores:
        groups = tuple((name, n, f"{value:.2f}") for name, n, value in comparison.by_group(comparison.adapter))
        report(Table(f"adapter by {comparison.spec.group_by}", (comparison.spec.group_by, "rows", "score"), groups))


def _shown(change: Interval) -> str:
    if not math.isfinite(change.low):
        return f"{number(change.point)} (one row: no interval)"
    return f"{interval(change.point, change.low, change.high)} (95 %)"
