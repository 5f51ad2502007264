"""Measure base and adapter on held-out preferences and on general text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from peftkit.data.chat import Example
from peftkit.data.preference.audit import PreferenceAudit
from peftkit.data.preference.example import PreferenceExample
from peftkit.errors import DataError
from peftkit.evaluation.preference_comparison import PreferenceComparison, PreferenceMeasured
from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.retention import load_text
from peftkit.events import Phase, Report, silent
from peftkit.generation.forward import autocast, row_nll
from peftkit.tuning.tuned import Tuned


def compare_preference(
    tuned: Tuned, audit: PreferenceAudit, spec: PreferenceEvaluateSpec, report: Report = silent
) -> PreferenceComparison:
    """Measure the base and the adapter on the held-out answers and on general text."""
    better, worse, paired = held_out_answers(audit.held_out.examples)
    text = None
    if spec.retention:
        text = load_text(spec.retention, tuned.backbone.tokenizer, limit=spec.retention_passages)

    def measure(name: str, using: Callable[[], AbstractContextManager[Any]]) -> PreferenceMeasured:
        backbone = tuned.backbone
        report(Phase(f"measure {name}", None))
        mode = tuned.model.training
        with using() as model, autocast(backbone.device, backbone.placement.compute_dtype):
            model.eval()

            def nll(rows: Sequence[Any]) -> list[float]:
                options: dict[str, Any] = {"pad_id": backbone.tokenizer.pad_id, "device": backbone.device}
                return row_nll(model, rows, **options, batch_size=spec.batch_size)

            general = nll(text.passages) if text is not None else []
            found = PreferenceMeasured(name, -np.array(nll(better)), -np.array(nll(worse)), general)
        tuned.model.train(mode)
        return found

    base, adapter = measure("base", tuned.as_base), measure("adapter", lambda: nullcontext(tuned.model))
    return PreferenceComparison(better, worse, paired, text, base, adapter)


def held_out_answers(examples: Sequence[PreferenceExample]) -> tuple[tuple[Example, ...], tuple[Example, ...], bool]:
    """Better answers, worse answers, and whether the n-th of both are of one pair.

    Labelled rows are paired where each stands beside one of the other label from the same place in the file.
    """
    if all(example.rejected is not None for example in examples):
        rejected = tuple(example.rejected for example in examples if example.rejected is not None)
        return tuple(example.chosen for example in examples), rejected, True
    wanted = tuple(example.chosen for example in examples if example.desirable)
    unwanted = tuple(example.chosen for example in examples if not example.desirable)
    places = {one.where for one in wanted}, {one.where for one in unwanted}
    if places[0] == places[1] and len(wanted) == len(unwanted) == len(places[0]):
        by_place = {one.where: one for one in unwanted}
        return wanted, tuple(by_place[one.where] for one in wanted), True
    if not wanted or not unwanted:
        raise DataError(
            f"all {len(examples):,} held-out rows have the same label, so there is nothing to rank",
            expected="wanted and unwanted answers",
            hint="raise data.held_out_share or data.max_held_out_rows, or choose data.held_out",
        )
    return wanted, unwanted, False


__all__ = [
    "PreferenceComparison",
    "PreferenceEvaluateSpec",
    "PreferenceMeasured",
    "compare_preference",
    "held_out_answers",
]
