"""Registered adapters that translate or summarize when they are asked to, against their base on further rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from peftkit.base.ref import longest_sequence, read_config
from peftkit.data.tasks.asked import encode_asked, instruction_later
from peftkit.data.tasks.read import TaskDataset
from peftkit.data.tasks.spec import TaskSpec
from peftkit.evaluation.answered import BASE, AnsweredComparison, compare_answered
from peftkit.evaluation.held_out import Contestant
from peftkit.evaluation.registered.recorded import check_same, refuse_shots, task_settings, tell_left_out
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Report, silent
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, names_for


def evaluate_texts(
    host: Attached,
    versions: Sequence[Version],
    source: str,
    data: TaskDataset,
    spec: TaskSpec,
    measure: TaskEvaluateSpec,
    *,
    report: Report = silent,
) -> list[AnsweredComparison]:
    """Measure the base once and every attached version on the same rows, asked as their runs asked.

    Raises DataError for rows that cannot be used, and for versions that were asked in different ways.
    """
    refuse_shots(measure.shots)
    tell_left_out(versions[0], measure, report)
    instruction = _instruction(versions, source, data)
    report(Note(f"each row is asked as {instruction!r} (as in training), a blank line and the text"))
    backbone = host.backbone
    limit = longest_sequence(read_config(backbone.base.folder))
    rows = encode_asked(spec, data, instruction, backbone.tokenizer, limit, report)
    base = Contestant(BASE, partial(host.using, None))
    found: list[AnsweredComparison] = []
    for name in names_for(versions):
        adapter, first = Contestant(name, partial(host.using, name)), found[0] if found else None
        found.append(compare_answered(base, adapter, rows, measure, backbone, first=first, report=report))
    return found


def _instruction(versions: Sequence[Version], source: str, data: TaskDataset) -> str:
    """What the runs asked. Raises DataError where they did not ask the same, or cut in different ways."""
    made = []
    for version in versions:
        spec, recorded = task_settings(version), version.manifest.metrics.other.get("instruction")
        asked = instruction_later(spec, recorded if isinstance(recorded, str) else None, source, data)
        made.append({**spec.model_dump(include={"task", "max_length", "too_long"}), "instruction": asked})
    check_same(versions, made)
    return str(made[0]["instruction"])
