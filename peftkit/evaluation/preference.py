"""Measure base and adapter on held-out preferences and on general text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.backbone.load import Backbone
from peftkit.data.chat import Example
from peftkit.data.preference.example import PreferenceExample
from peftkit.errors import DataError
from peftkit.evaluation.held_out import Contestant
from peftkit.evaluation.preference_comparison import PreferenceComparison, PreferenceMeasured
from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.retention import load_text
from peftkit.events import Phase, Report, silent
from peftkit.generation.forward import autocast, row_nll


def compare_preference(
    base: Contestant,
    adapter: Contestant,
    examples: Sequence[PreferenceExample],
    spec: PreferenceEvaluateSpec,
    backbone: Backbone,
    *,
    first: PreferenceComparison | None = None,
    report: Report = silent,
) -> PreferenceComparison:
    """Measure base and adapter on the same answers and on general text; of `first` the base's figures are taken.

    Raises DataError where there is nothing to rank.
    """
    better, worse, paired = held_out_answers(examples)
    text = first.text if first is not None else None
    if first is None and spec.retention:
        text = load_text(spec.retention, backbone.tokenizer, limit=spec.retention_passages)
    sides = better, worse, text.passages if text is not None else ()
    before = first.base if first is not None else _measure(base, sides, spec, backbone, report)
    return PreferenceComparison(better, worse, paired, text, before, _measure(adapter, sides, spec, backbone, report))


def _measure(
    contestant: Contestant,
    sides: tuple[Sequence[Any], Sequence[Any], Sequence[Any]],
    spec: PreferenceEvaluateSpec,
    backbone: Backbone,
    report: Report,
) -> PreferenceMeasured:
    """One contestant's log-likelihoods of the better answers, the worse ones, and general text."""
    report(Phase(f"measure {contestant.name}", None))
    options: dict[str, Any] = {"pad_id": backbone.tokenizer.pad_id, "device": backbone.device}
    with contestant.using() as model, autocast(backbone.device, backbone.placement.compute_dtype):
        mode = model.training
        model.eval()
        general, better, worse = (
            row_nll(model, rows, **options, batch_size=spec.batch_size) for rows in (sides[2], *sides[:2])
        )
        model.train(mode)
    return PreferenceMeasured(contestant.name, -np.array(better), -np.array(worse), general)


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
