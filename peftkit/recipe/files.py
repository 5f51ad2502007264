"""Recipe files: find them, load them by path, copy them, resolve their settings.

A recipe is a file with a `Config` and a `main(cfg, run)`. It is loaded by path, so an installed recipe, a checkout and
a user's edited copy behave the same.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.config import Resolved, Spec, resolve
from peftkit.errors import PeftkitError, RunError
from peftkit.registry.manifest import Version


@dataclass(frozen=True)
class Recipe:
    """A recipe file that was found and loaded."""

    name: str
    path: Path
    config: type[Spec]
    main: Any
    presets: Mapping[str, Mapping[str, Any]]

    @property
    def summary(self) -> str:
        """The first line of the file's docstring."""
        return (inspect.getdoc(sys.modules[self.main.__module__]) or "").split("\n", 1)[0]

    @property
    def sha256(self) -> str:
        """Digest of the file, for the manifest."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.py"))}


def find(name_or_path: str) -> Path:
    """The file of a shipped recipe, or a user's own. Raises RunError naming what exists."""
    path = Path(name_or_path)
    if path.suffix == ".py" and path.is_file():
        return path
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    near = difflib.get_close_matches(path.stem, known, n=1)
    raise RunError(
        f"there is no recipe {name_or_path!r}",
        expected="a .py file, or one of: " + ", ".join(known),
        hint=f"did you mean {near[0]}?" if near else "peftkit recipes list",
    )


def recipe_of(version: Version) -> Path:
    """The shipped recipe that made a version. Raises RunError when there is none, or its file has changed since.

    A manifest may come from a stranger, so its name of a recipe is only ever looked up among the shipped ones.
    """
    made_by = version.manifest.recipe
    if made_by is None:
        raise RunError(
            f"{version.reference} was not made by a recipe: it was imported, or made from other adapters",
            expected="an adapter that peftkit train made",
        )
    path = shipped().get(made_by.name)
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != made_by.sha256:
        what = "is not a shipped recipe" if path is None else "has changed since"
        raise RunError(
            f"the recipe {made_by.name!r} of {version.reference} {what}",
            expected=f"the file with the SHA-256 {made_by.sha256[:16]}…",
            hint=f"peftkit reproduce {version.name} --recipe FILE, if you trust the file",
        )
    return path


def load(path: Path) -> Recipe:
    """Load a recipe file by its path. Raises RunError when it is not a recipe or does not import."""
    name = f"peftkit_recipe_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RunError(f"{path} cannot be loaded as Python", expected="a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves a Config's annotations through sys.modules
    try:
        spec.loader.exec_module(module)
    except PeftkitError:
        raise
    except Exception as error:
        raise RunError(f"{path} does not import: {type(error).__name__}: {error}", hint=f"python {path}") from error
    config, main = getattr(module, "Config", None), getattr(module, "main", None)
    if not (isinstance(config, type) and issubclass(config, Spec)) or not callable(main):
        raise RunError(
            f"{path} is not a recipe",
            expected="a class Config(peftkit.Spec) and a function main(cfg, run)",
            hint="start from a copy: peftkit recipes copy qlora_sft",
        )
    return Recipe(path.stem, path, config, main, getattr(module, "PRESETS", {}))


def copy(name: str, target: Path) -> Path:
    """Copy a shipped recipe to `target` (a file or a folder). Raises RunError rather than overwrite."""
    source = find(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RunError(f"{target} exists already", hint="choose another name, or remove it")
    shutil.copyfile(source, target)
    return target


def default_name(recipe: Recipe) -> str:
    """The adapter name when save_as is not given."""
    return recipe.name.replace("_", "-").lower()


def configure(
    recipe: Recipe, *, preset: str | None = None, files: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> Resolved[Any]:
    """Resolve a recipe's settings from its presets, files and `key=value` overrides."""
    return resolve(recipe.config, presets=recipe.presets, preset=preset, files=files, overrides=overrides)
