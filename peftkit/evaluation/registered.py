"""Registered adapters against their base on any held-out file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from peftkit.base.ref import longest_sequence, read_config
from peftkit.data.audit import DataSpec, encode, recorded_rendering
from peftkit.data.formats import Dataset, load_rows
from peftkit.errors import DataError
from peftkit.evaluation.held_out import Comparison, Contestant, compare, prepare
from peftkit.evaluation.preflight import preflight
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Report, silent
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, names_for


def evaluate_attached(
    host: Attached, versions: Sequence[Version], rows: str | Path, spec: EvaluateSpec, *, report: Report = silent
) -> list[Comparison]:
    """Measure the base once and every attached version on the same rows, rendered as the first was trained.

    Raises DataError when versions were trained with different renderings: their figures would not be comparable.
    """
    if spec.shots:
        raise DataError(
            f"evaluate.shots={spec.shots}, but solved examples come from training rows, and there are none here",
            expected="evaluate.shots in a training run",
            hint="put examples into evaluate.instructions",
        )
    renderings = [recorded_rendering(v.manifest.recipe.config if v.manifest.recipe else {}) for v in versions]
    if any(rendering != renderings[0] for rendering in renderings):
        names = ", ".join(version.reference for version in versions)
        raise DataError(f"{names} were trained with different data.* renderings", hint="evaluate them one by one")
    rendering = renderings[0]
    settings = DataSpec(
        loss=rendering.loss,
        think=rendering.think,
        template=rendering.template,
        template_kwargs=dict(rendering.kwargs or {}),
    )
    source = _load(rows, versions[0])
    limit = longest_sequence(read_config(host.backbone.base.folder))
    part = encode(source.rows, source, "held_out", host.backbone.tokenizer, settings, limit)
    preflight(spec, part.rows, host.backbone.tokenizer)
    held = prepare(part, rendering, spec, host.backbone, report)
    base = Contestant("base", partial(host.using, None))
    comparisons: list[Comparison] = []
    for name in names_for(versions):
        contestant = Contestant(name, partial(host.using, name))
        first = comparisons[0] if comparisons else None
        before, prompted = (first.base, first.prompted) if first else (None, None)
        compared = compare(base, contestant, held, spec, host.backbone, before=before, prompted=prompted, report=report)
        comparisons.append(compared)
    return comparisons


def _load(rows: str | Path, version: Version) -> Dataset:
    """The rows; where they are those of another kind that a version was trained on, the error says what to give."""
    try:
        return load_rows(rows)
    except DataError as error:
        config = version.manifest.recipe.config if version.manifest.recipe else {}
        data = config.get("data")
        given = data if isinstance(data, Mapping) else {}
        if "task" in given:
            asked = version.manifest.metrics.other.get("instruction")
            hint = f"give rows of prompt and completion, each prompt beginning with the instruction {asked!r}"
        elif given.get("kind") in ("pairs", "labelled"):
            hint = "preferences are measured in the run alone; rows with one answer measure how likely it is"
        else:
            raise
        raise DataError(error.fact, expected=error.expected, hint=hint) from error
