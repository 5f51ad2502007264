"""Registered adapters that were trained on preferences, against their base on further rows of these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from peftkit.base.ref import longest_sequence, read_config
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.preference.audit import encode_measured
from peftkit.data.preference.example import PreferenceExample
from peftkit.data.preference.rows import PreferenceSet
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.errors import DataError
from peftkit.evaluation.held_out import Contestant
from peftkit.evaluation.preference import (
    PreferenceComparison,
    PreferenceEvaluateSpec,
    compare_preference,
    held_out_answers,
)
from peftkit.evaluation.registered.recorded import check_same, preference_settings
from peftkit.evaluation.retention import load_text
from peftkit.events import Report, silent
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, names_for

_OF_SEQUENCES = {"kind", "think", "template", "template_kwargs", "max_length", "too_long"}


def evaluate_preferences(
    host: Attached,
    versions: Sequence[Version],
    data: PreferenceSet,
    spec: PreferenceSpec,
    measure: PreferenceEvaluateSpec,
    *,
    report: Report = silent,
) -> list[PreferenceComparison]:
    """Measure the base once and every attached version on the same answers, rendered as in training.

    Raises DataError for rows that cannot be used or ranked, and for versions that were trained on others.
    """
    check_same(versions, [preference_settings(version).model_dump(include=_OF_SEQUENCES) for version in versions])
    backbone = host.backbone
    limit = longest_sequence(read_config(backbone.base.folder))
    _check_text(measure, backbone.tokenizer)
    examples = encode_measured(spec, data, backbone.tokenizer, limit, report).examples
    _check_labels(examples)
    base = Contestant("base", partial(host.using, None))
    found: list[PreferenceComparison] = []
    for name in names_for(versions):
        adapter, first = Contestant(name, partial(host.using, name)), found[0] if found else None
        found.append(compare_preference(base, adapter, examples, measure, backbone, first=first, report=report))
    return found


def _check_text(measure: PreferenceEvaluateSpec, tokenizer: Tokenizer) -> None:
    """Raise DataError for a text of forgetting that is not here: a manifest keeps its name without the folder."""
    try:
        if measure.retention:
            load_text(measure.retention, tokenizer, limit=1)
    except DataError as error:
        hint = "--set retention=FILE says where it is, --set retention=general takes the text that ships with peftkit"
        raise DataError(error.fact, expected=error.expected, hint=hint) from None


def _check_labels(examples: Sequence[PreferenceExample]) -> None:
    """Raise DataError for rows that are all wanted, or all unwanted."""
    try:
        held_out_answers(examples)
    except DataError as error:
        raise DataError(error.fact, expected=error.expected, hint="add rows of the other label") from None
