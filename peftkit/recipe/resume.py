"""Go on with a run from its newest checkpoint: its recipe and settings, read from its folder."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit import locations
from peftkit.config import Resolved
from peftkit.errors import RunError
from peftkit.process_group import launched
from peftkit.recipe.files import Recipe, configure, load
from peftkit.runs import RunFolder, RunStatus, load_run
from peftkit.runs.contents import CHECKPOINTS

_RECIPE = "recipe"


def keep_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Copy the recipe's file into the run's folder: the user may edit theirs before the run is resumed."""
    (folder.path / _RECIPE).mkdir()
    shutil.copyfile(recipe.path, folder.path / _RECIPE / recipe.path.name)


def recipe_and_settings(
    runs: Path,
    run: str,
    *,
    recipe: Path | None = None,
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
) -> tuple[RunStatus, Recipe, Resolved[Any]]:
    """A run to go on with, its recipe (or the file `recipe`), and its settings with what is asked for on top.

    Raises RunError when there is no such run, or nothing to go on from.
    """
    status = load_run(runs, run)
    kept = sorted((status.path / _RECIPE).glob("*.py"))
    if recipe is None and not kept:
        raise RunError(f"run {status.id} has no copy of its recipe", expected=f"a file in {status.path / _RECIPE}",
                       hint=f"name the recipe: peftkit train RECIPE --resume {status.id}")  # fmt: skip
    loaded = load(recipe or kept[0])
    config = status.path / "config.yaml"
    if not config.is_file():
        raise RunError(
            f"run {status.id} has no settings any more",
            expected=f"the file {config}",
            hint="start it again without --resume",
        )
    resolved = configure(loaded, files=[config, *files], overrides=overrides)
    if status.state == "done" and status.saved_as and resolved.as_dict() == configure(loaded, files=[config]).as_dict():
        raise RunError(
            f"run {status.id} is done, and saved as {status.saved_as}",
            expected="a run that was interrupted, or more to do",
            hint=f"peftkit train --resume {status.id} train.num_train_epochs=…, or another save_as",
        )
    return status, loaded, resolved


def how_to_resume(folder: RunFolder, registry: Path) -> str | None:
    """The command that goes on with a run, or None when there is no checkpoint of it."""
    if not any((folder.path / CHECKPOINTS).glob("step-*")):
        return None
    words = ["train", "--resume", folder.id]
    used = {"--runs": (folder.path.parent, locations.runs_root()), "--registry": (registry, locations.registry_root())}
    for flag, (path, usual) in used.items():
        words += [flag, str(path)] if path.absolute() != usual.path.absolute() else []
    program = "accelerate launch (as before) -m peftkit" if launched().size > 1 else "peftkit"
    return f"go on with: {program} {shlex.join(words)}"
