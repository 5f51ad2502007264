"""Registered adapters against their base on further conversations and texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from peftkit.base.ref import longest_sequence, read_config
from peftkit.data.audit import DataSpec, encode, recorded_rendering
from peftkit.data.formats import Dataset
from peftkit.errors import DataError
from peftkit.evaluation.held_out import Comparison, Contestant, compare, prepare
from peftkit.evaluation.preflight import preflight
from peftkit.evaluation.registered.recorded import refuse_shots
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Report, silent
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, names_for


def evaluate_attached(
    host: Attached, versions: Sequence[Version], source: Dataset, spec: EvaluateSpec, *, report: Report = silent
) -> list[Comparison]:
    """Measure the base once and every attached version on the same rows, rendered as the first was trained.

    Raises DataError when versions were trained with different renderings: their figures would not be comparable.
    """
    refuse_shots(spec.shots)
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
