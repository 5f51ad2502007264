"""`peftkit reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot, RunsRoot
from peftkit.errors import RunError
from peftkit.recipe import load, recipe_of
from peftkit.registry.store import Registry


def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name, name@version or name@alias.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Where rows are now, such as data.train=….")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="The recipe file, when it is your own.")] = None,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Build an adapter again from its manifest, and compare the result byte for byte; nothing is published.

    Exits with 1 when the bytes differ.

    Example: peftkit reproduce tickets data.train=tickets.jsonl
    """
    root = locations.registry_root(registry).path
    version = Registry(root).resolve(name)
    loaded = load(recipe if recipe else recipe_of(version))
    from peftkit.recipe.reproduce import reproduce as build_again

    with Reporter(as_json=as_json) as report:
        places = {"registry": root, "runs": locations.runs_root(runs).path}
        found = build_again(version, loaded, **places, overrides=settings or [], report=report)
    value = {"reference": found.reference, "same": found.same, "files": found.files, "environment": found.environment}
    lines = [
        f"{path}: {'the same bytes' if was == now else f'{was} → {now}'}" for path, (was, now) in found.files.items()
    ]
    show(value, as_json=as_json, text="\n".join(lines))
    if not found.same:
        asked = [f"the settings given ({' '.join(settings)})"] if settings else []
        differs = ", ".join([*asked, *found.environment]) or "nothing that is recorded"
        raise RunError(
            f"{found.reference} was not reproduced: its files came out with other bytes",
            expected="the same digests, on a CPU with the same versions and number of cores",
            hint=f"what differs from then: {differs}",
        )
