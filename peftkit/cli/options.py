"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit import locations
from peftkit.errors import RegistryError
from peftkit.registry.store import Registry

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RegistryRoot = Annotated[Path | None, typer.Option("--registry", help="Folder of the adapter registry.")]
RunsRoot = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs.")]
Base = Annotated[str | None, typer.Option("--base", help="Hub id, folder, .gguf file or embedded:smollm2-135m.")]
OtherBase = Annotated[bool, typer.Option("--other-base", help="Use the adapter on a base it was not trained on.")]
Bits = Annotated[int | None, typer.Option("--bits", help="4, 8, 16 or 32; what the adapter was trained on by default.")]
Reference = Annotated[str, typer.Argument(metavar="NAME", help="name, name@version or name@alias.")]


def open_registry(flag: Path | None) -> Registry:
    """The registry that the flag, the environment or this checkout names. Raises RegistryError for a file."""
    place = locations.registry_root(flag)
    if place.path.exists() and not place.path.is_dir():
        raise RegistryError(f"{place.path} ({place.reason}) is a file", expected="a folder")
    return Registry(place.path)
