"""`peftkit plan`: what a recipe would take, from its base's config, with or without rows; nothing heavy is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.backbone.locate import locate
from peftkit.backbone.upload import agree_with_upload
from peftkit.base.ref import longest_sequence, read_config
from peftkit.config import Resolved
from peftkit.events import Note, Report, Warned, silent
from peftkit.planning.architecture import architecture
from peftkit.recipe.fitting import fitted
from peftkit.recipe.forecast import Forecast, forecast
from peftkit.recipe.groups import Groups, groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.target import Target
from peftkit.recipe.to_train import groups_to_train
from peftkit.recipe.work import check_planned
from peftkit.registry.store import Registry


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
    check_planned(given.data)
    located = locate(given.base, cache, report, weights=False)
    config = read_config(located.folder)
    agree_with_upload(given.quant, config, located.source)
    shape = architecture(config)
    if "vision_config" in config:
        report(Warned("the plan is that of the language model alone: this base sees images too", None))
    lengths = _lengths(given, located.folder, cache, report)
    if fit:
        resolved = fitted(resolved, given.adapter, shape, lengths, target, report, shorter=shorter)
    planned = replace(groups(resolved.config), adapter=given.adapter)
    return forecast(shape, planned, _cut(lengths, resolved), target), resolved


def _lengths(given: Groups, folder: Path, cache: Path, report: Report) -> Lengths:
    limit = longest_sequence(read_config(folder))
    if given.data.train is None and not given.data.mixture:
        lengths = Lengths.assumed(given.data.max_length)
        why = "data.max_length" if given.data.max_length else "no data.train and no data.max_length"
        report(Note(f"rows are taken to have {lengths.longest:,} tokens ({why})"))
        return lengths
    from peftkit.base.tokenizer import load_tokenizer
    from peftkit.data.audit import audit

    data = audit(given.data, load_tokenizer(folder), limit, report, cache)
    return Lengths.of(data.train.examples, data.held_out.examples, given.train.rows_per_step)


def _cut(lengths: Lengths, resolved: Resolved[Any]) -> Lengths:
    """The rows as a fit with consent would cut them."""
    limit = groups(resolved.config).data.max_length
    return lengths if limit is None else lengths.at_most(limit)
