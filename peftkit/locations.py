"""Where the registry, the runs and the cache live: flag > environment > this checkout > the user's folders.

Nothing here creates a folder; who writes first does.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import ConfigError


@dataclass(frozen=True)
class Located:
    """A folder, and why it is this one; the CLI says both."""

    path: Path
    reason: str


def registry_root(flag: str | Path | None = None) -> Located:
    """The folder of the adapter registry; raises ConfigError when no home folder can be found."""
    return _given(flag, "registry") or _of_checkout("adapters") or _of_user("XDG_DATA_HOME", ".local/share", "adapters")


def runs_root(flag: str | Path | None = None) -> Located:
    """The folder that holds one folder per run; raises ConfigError when no home folder can be found."""
    return _given(flag, "runs") or _of_checkout("runs") or _of_user("XDG_DATA_HOME", ".local/share", "runs")


def cache_root(flag: str | Path | None = None) -> Located:
    """The folder of what can be made again, such as converted bases; raises ConfigError without a home folder."""
    return _given(flag, "cache") or _of_user("XDG_CACHE_HOME", ".cache", "")


def _given(flag: str | Path | None, what: str) -> Located | None:
    variable = f"PEFTKIT_{what.upper()}"
    # An empty variable counts as unset, as everywhere in a shell; an empty flag is a mistake in a script.
    for text, reason in ((flag, f"--{what}"), (os.environ.get(variable) or None, variable)):
        if text is None:
            continue
        if not str(text):
            raise ConfigError([f"{reason}: must name a folder, got an empty text"])
        try:
            return Located(Path(text).expanduser().absolute(), reason)
        except RuntimeError as error:
            raise ConfigError([f"{reason}: {text} cannot be expanded ({error})"]) from None
    return None


def _of_checkout(name: str) -> Located | None:
    """`./adapters` or `./runs`; `adapters` decides for both, because `runs` is only made by the first run."""
    here = Path.cwd()
    if not _holds_registry(here):
        return None
    return Located(here / name, f"./{name} of this checkout")


def _holds_registry(folder: Path) -> bool:
    adapters = folder / "adapters"
    if not adapters.is_dir():
        return False
    if (adapters / "registry.json").is_file():
        return True
    if (adapters / ".gitignore").is_file() and any((adapters / name).is_file() for name in ("README.md", "README")):
        return True
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project")
    except (OSError, ValueError):
        return False
    return isinstance(project, dict) and project.get("name") == "peftkit"


def _of_user(variable: str, fallback: str, name: str) -> Located:
    """A folder of the user; the XDG rules say that a relative or empty variable must be ignored."""
    given = Path(os.environ.get(variable, ""))
    if given.is_absolute():
        return Located(given / "peftkit" / name, f"{variable}, the user's folder")
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ConfigError(
            [f"the user's home folder is unknown ({error})"],
            hint="export PEFTKIT_REGISTRY, PEFTKIT_RUNS and PEFTKIT_CACHE, or HOME",
        ) from None
    return Located(home / fallback / "peftkit" / name, f"the user's folder, ~/{fallback}")
