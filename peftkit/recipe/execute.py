"""Run a recipe from a fresh run folder to its end, and record how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftkit import locations
from peftkit.config import Resolved
from peftkit.environment import environment
from peftkit.errors import RunError, TrainingError
from peftkit.events import Decision, Event, Note, Progress, Report, Warned, silent
from peftkit.process_group import ProcessGroup, launched
from peftkit.recipe.binding import Binding
from peftkit.recipe.fields import with_whole_paths
from peftkit.recipe.files import Recipe, default_name
from peftkit.recipe.follower import FollowerFolder
from peftkit.recipe.keeping import described
from peftkit.recipe.resume import how_to_resume, keep_recipe
from peftkit.recipe.run import Interrupted, PlannedOnly, Run
from peftkit.registry.layout import check_name
from peftkit.registry.store import Registry
from peftkit.runs import RunFolder, RunStatus
from peftkit.runs.contents import CHECKPOINTS, UNPUBLISHED

if TYPE_CHECKING:
    from peftkit.training.checkpoint import Checkpoint


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
    resume: RunStatus | None = None,
    budget: str | None = None,
) -> Result:
    """Run a recipe's main to its end in a fresh run folder, or in that of the run to `resume`; record how it ended.

    The adapter is published to `registry`, from which `init_from` is read too, unless `publish_to` names another.
    With a `budget`, such as 12GB, the settings are first changed to fit into it. Raises what the recipe raises;
    Interrupted after Ctrl-C.
    """
    store = Registry(locations.registry_root(registry).path)
    check_name(getattr(resolved.config, "save_as", None) or default_name(recipe))  # before hours of training, not after
    cache = locations.cache_root().path
    group = launched()
    report = report if group.leads else silent
    if dry_run:
        run = Run(recipe, resolved, store, cache, None, report, other_base)
        try:
            if budget:
                run.fit(budget)
            recipe.main(run.resolved.config, run)
        except PlannedOnly:
            report(Note("dry run: nothing was trained or written"))
        return Result(None, None, {})
    with _joined(group):
        folder = _folder(recipe, resolved, runs, resume) if group.leads else FollowerFolder(group)
        folder.notify = report

        def recorded(event: Event) -> None:
            if not isinstance(event, Progress):  # steps are in metrics.jsonl already
                folder.record(event)
            report(event)

        target = Registry(publish_to) if publish_to else None
        run = Run(recipe, resolved, store, cache, folder, recorded, other_base, target)
        recorded(Note(f"run {folder.id} in {folder.path}"))
        if group.size > 1:
            recorded(Decision("processes", f"{group.size}", f"base {group.how}; each step's rows are shared out"))
        with _recorded_end(run, folder, report, resumed=resume is not None):
            if resume is not None:
                run.start = _newest(resume, recorded)
            elif group.leads:
                keep_recipe(recipe, folder)
            run.binding = Binding(folder.id, run.start.state["bound_to"] if run.start else None)
            if budget:
                run.fit(budget)
            run.binding.settings(recipe, run.resolved)
            recipe.main(run.resolved.config, run)
    return Result(folder.id, run.saved.reference if run.saved else None, run.figures)


def _folder(recipe: Recipe, resolved: Resolved[Any], runs: Path | None, resume: RunStatus | None) -> RunFolder:
    if resume is not None:
        return RunFolder.reopen(resume.path)
    return RunFolder.create(
        locations.runs_root(runs).path, recipe.name, with_whole_paths(resolved.as_dict()), environment()
    )


@contextmanager
def _joined(group: ProcessGroup) -> Iterator[None]:
    """Be one of several processes, if there are several, from before anything is written to after all is."""
    if group.size == 1:
        yield
        return
    from peftkit.training.parallel import leave, team

    team()
    try:
        yield
    except BaseException:
        leave(in_order=False)
        raise
    leave(in_order=True)


@contextmanager
def _recorded_end(run: Run, folder: RunFolder, report: Report, *, resumed: bool) -> Iterator[None]:
    """Write into the run's folder how what stands inside ended; a run that was not gone on with stays as it was."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        if resumed and not run.begun:
            folder.give_back()
            raise
        _finish(folder, report, "interrupted", error=str(error), figures=run.figures)
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(
            f"run {folder.id} was interrupted{_kept(folder)}", hint=how_to_resume(folder, run.registry.root)
        ) from None
    except BaseException as error:
        if resumed and not run.begun:
            folder.give_back()
            raise
        _finish(folder, report, "failed", error=f"{type(error).__name__}: {error}", figures=run.figures)
        if kept := _kept(folder):
            report(Note(f"run {folder.id} failed{kept}"))
        # What stopped training itself would stop it again; what came after can be done again.
        if (how := how_to_resume(folder, run.registry.root)) and (
            "training" in run.figures or not isinstance(error, TrainingError)
        ):
            report(Note(how))
        raise
    _finish(folder, report, "done", saved_as=run.saved.reference if run.saved else None, figures=run.figures)


def _finish(folder: RunFolder, report: Report, state: Literal["done", "failed", "interrupted"], **facts: Any) -> None:
    """Record the end; a disk without room for it must not hide how the run ended."""
    try:
        folder.finish(state, **facts)
    except RunError as error:
        report(Warned(f"how the run ended is not recorded: {error.fact}", error.hint))


def _newest(run: RunStatus, report: Report) -> Checkpoint:
    from peftkit.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.path / CHECKPOINTS, report)
    found = checkpoints.newest()
    if found is None:
        raise RunError(
            f"run {run.id} has no checkpoint to go on from",
            expected=f"a folder step-… in {checkpoints.folder}",
            hint="start it again without --resume",
        )
    report(Note(f"going on from step {found.step}"))
    return found


def _kept(folder: RunFolder) -> str:
    """Where the trained adapter is when it was not published."""
    adapter = folder.path / UNPUBLISHED
    return f"; the trained adapter is {described(adapter)}" if adapter.exists() else ""
