"""Run a recipe from a fresh run folder to its end, and record how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import locations
from peftkit.config import Resolved
from peftkit.environment import environment
from peftkit.events import Event, Note, Progress, Report, silent
from peftkit.recipe.files import Recipe, default_name
from peftkit.recipe.run import UNPUBLISHED, Interrupted, PlannedOnly, Run
from peftkit.registry.layout import check_name
from peftkit.registry.store import Registry
from peftkit.runs import RunFolder


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    run_id: str | None
    saved_as: str | None
    figures: dict[str, Any]


def execute(
    recipe: Recipe,
    resolved: Resolved[Any],
    *,
    registry: Path | None = None,
    publish_to: Path | None = None,
    runs: Path | None = None,
    report: Report = silent,
    dry_run: bool = False,
    other_base: bool = False,
) -> Result:
    """Run a recipe's main from a fresh run folder to its end, recording events and how it ended.

    The adapter is published to `registry`, from which `init_from` is read too, unless `publish_to` names another.
    Raises what the recipe raises; Interrupted after Ctrl-C.
    """
    store = Registry(locations.registry_root(registry).path)
    check_name(getattr(resolved.config, "save_as", None) or default_name(recipe))  # before hours of training, not after
    cache = locations.cache_root().path
    if dry_run:
        run = Run(recipe, resolved, store, cache, None, report, other_base)
        try:
            recipe.main(resolved.config, run)
        except PlannedOnly:
            report(Note("dry run: nothing was trained or written"))
        return Result(None, None, {})
    folder = RunFolder.create(locations.runs_root(runs).path, recipe.name, resolved.as_dict(), environment())
    folder.notify = report

    def recorded(event: Event) -> None:
        if not isinstance(event, Progress):  # steps are in metrics.jsonl already
            folder.record(event)
        report(event)

    target = Registry(publish_to) if publish_to else None
    run = Run(recipe, resolved, store, cache, folder, recorded, other_base, target)
    recorded(Note(f"run {folder.id} in {folder.path}"))
    try:
        recipe.main(resolved.config, run)
    except (KeyboardInterrupt, Interrupted) as error:
        folder.finish("interrupted", error=str(error), figures=run.figures)
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(f"run {folder.id} was interrupted{_kept(folder)}") from None
    except BaseException as error:
        folder.finish("failed", error=f"{type(error).__name__}: {error}", figures=run.figures)
        if _kept(folder):
            report(Note(f"run {folder.id} failed after training{_kept(folder)}"))
        raise
    saved = run.saved.reference if run.saved else None
    folder.finish("done", saved_as=saved, figures=run.figures)
    return Result(folder.id, saved, run.figures)


def _kept(folder: RunFolder) -> str:
    """Where the trained adapter is when it was not published."""
    adapter = folder.path / UNPUBLISHED
    return f"; the trained adapter is a PEFT checkpoint in {adapter}" if adapter.exists() else ""
