"""`peftkit plan`: what a recipe would take, from its base's config, with or without rows; nothing heavy is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.backbone.locate import locate
from peftkit.backbone.upload import agree_with_upload
from peftkit.base.ref import LocatedBase, longest_sequence, read_config
from peftkit.config import Resolved
from peftkit.data.spec import DataSpec
from peftkit.events import Note, Report, Warned, silent
from peftkit.planning.architecture import architecture
from peftkit.recipe.fitting import fitted
from peftkit.recipe.forecast import Forecast, forecast
from peftkit.recipe.groups import Groups, groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.target import Target
from peftkit.recipe.to_train import foreign_rate, groups_to_train
from peftkit.registry.store import Registry, Version
from peftkit.training.distil.spec import TEACHER_UNPLANNED, DistilSpec


def outlook(
    resolved: Resolved[Any],
    cache: Path,
    registry: Registry,
    target: Target,
    *,
    fit: bool = False,
    shorter: bool = False,
    report: Report = silent,
) -> tuple[Forecast, Resolved[Any]]:
    """Plan a recipe for a target; with `fit`, change its settings until they fit. Returns the plan and the settings.

    `registry` holds the adapter that `init_from` may name. Raises BaseError for a base that cannot be found or planned,
    DataError for rows that cannot be used, TrainingError when nothing fits, and what a run refuses before it loads.
    """
    given = groups_to_train(resolved, registry)
    if (warning := foreign_rate(resolved)) is not None:
        report(warning)
    if any(isinstance(getattr(resolved.config, name), DistilSpec) for name in type(resolved.config).model_fields):
        report(TEACHER_UNPLANNED)
    located = locate(given.base, cache, report, weights=False)
    config = read_config(located.folder)
    agree_with_upload(given.quant, config, located.source)
    shape = architecture(config)
    if "vision_config" in config:
        report(Warned("the plan is that of the language model alone: this base sees images too", None))
    init_from = getattr(resolved.config, "init_from", None)
    parent = registry.resolve(init_from) if init_from else None
    lengths = _lengths(given, located, cache, registry, parent, report)
    if fit:
        resolved = fitted(resolved, given.adapter, shape, lengths, target, report, shorter=shorter)
    planned = replace(groups(resolved.config), adapter=given.adapter)
    return forecast(shape, planned, _cut(lengths, resolved), target), resolved


def _lengths(
    given: Groups, located: LocatedBase, cache: Path, registry: Registry, parent: Version | None, report: Report
) -> Lengths:
    if given.data.train is None and not getattr(given.data, "mixture", None):
        lengths = Lengths.assumed(given.data)
        why = "data.max_length" if given.data.max_length else "no data.train and no data.max_length"
        report(Note(f"rows are taken to have {lengths.longest:,} tokens ({why})"))
        return lengths
    if isinstance(given.data, DataSpec):  # without what trains: a plan starts in a second
        from peftkit.base.tokenizer import load_tokenizer
        from peftkit.data.audit import audit

        limit = longest_sequence(read_config(located.folder))
        data: Any = audit(given.data, load_tokenizer(located.folder), limit, report, cache)
        return Lengths.of_run(data, given, None)
    from peftkit.recipe.work import Place, work_for

    work = work_for(given.data)
    data = work.audit(Place(located, cache, registry, report, parent), given.data, given.evaluate)
    return Lengths.of_run(data, given, work.head(data))


def _cut(lengths: Lengths, resolved: Resolved[Any]) -> Lengths:
    """The rows as a fit with consent would cut them."""
    data = groups(resolved.config).data
    cut = isinstance(data, DataSpec) and data.max_length
    return lengths.at_most(cut) if cut else lengths
