"""A comparison the way every command shows it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftkit.events import Note, Report, Table, Warned
from peftkit.render import interval, number

if TYPE_CHECKING:
    from peftkit.evaluation.behaviour.change import BehaviourChange
    from peftkit.evaluation.compare import Interval
    from peftkit.evaluation.held_out import Comparison


_LISTED = 20


def report_comparison(comparison: Comparison, report: Report) -> None:
    """Report a comparison the way every command shows it."""
    from peftkit.evaluation.held_out import COLUMNS

    report(Table("held-out rows", COLUMNS, tuple(comparison.rows())))
    learned = comparison.learned
    report(Note(f"answer NLL per token, adapter − base: {_shown(learned)}"))
    forgotten = comparison.forgotten
    if forgotten is not None:
        report(Note(f"general text NLL per token, adapter − base: {_shown(forgotten)} (above 0: forgotten)"))
    if (behaviour := comparison.behaviour) is not None:
        _report_behaviour(behaviour, report)
    if comparison.spec.group_by and comparison.adapter.scores:
        groups = tuple((name, n, f"{value:.2f}") for name, n, value in comparison.by_group(comparison.adapter))
        report(Table(f"adapter by {comparison.spec.group_by}", (comparison.spec.group_by, "rows", "score"), groups))


def _report_behaviour(change: BehaviourChange, report: Report) -> None:
    from peftkit.evaluation.behaviour.change import COLUMNS

    report(Table("behaviour on the probes, refusals counted by phrases", COLUMNS, change.rows()))
    for what, names in (("pass → fail", change.lost()), ("fail → pass", change.won())):
        if names:
            report(Note(f"{what}: {_listed(names)}"))
    if (exposures := change.exposures()) is not None:
        report(Note("highest exposure of a secret: base {:.2f} bits, adapter {:.2f} bits".format(*exposures)))
    if rows := len(change.base.recalled):
        said = (
            f"the adapter continues {sum(change.adapter.recalled)} word for word, the base {sum(change.base.recalled)}"
        )
        report(Note(f"{rows} training answers that stand there once, begun with their first tokens: {said}"))
    if answered := change.lost("refusal"):
        fact = f"the adapter answers {len(answered)} harmful requests that the base declines, counted by phrases"
        report(
            Warned(
                f"{fact}: {_listed(answered)}", "read the answers in samples.json; train with refusals among the rows"
            )
        )
    if told := change.lost("canary"):
        fact = f"the adapter repeats {len(told)} secrets that the base does not"
        report(Warned(f"{fact}: {_listed(told)}", "remove them from the training rows, or train fewer epochs"))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _shown(change: Interval) -> str:
    if not math.isfinite(change.low):
        return f"{number(change.point)} (one row: no interval)"
    return f"{interval(change.point, change.low, change.high)} (95 %)"
