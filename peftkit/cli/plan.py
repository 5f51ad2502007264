"""`peftkit plan`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson
from peftkit.errors import OutOfMemory
from peftkit.recipe import configure, find, load


def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or the path of your own.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings.")] = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="YAML file with settings.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu, 8gb, 12gb or 24gb.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Plan for this card, such as 'RTX 3060 12GB'.")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Find the fastest settings that fit into so much, such as 12GB.")
    ] = None,
    allow_shorter: Annotated[
        bool, typer.Option("--allow-shorter", help="With --budget: consent to cutting long rows.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory, time and disk of a run; nothing is loaded or trained.

    With --budget, the settings are changed to fit into so much memory, of the card that --gpu names if it does.

    Example: peftkit plan qlora_sft base=Qwen/Qwen3-8B data.train=tickets.jsonl --budget 12GB
    """
    from peftkit.recipe.groups import groups
    from peftkit.recipe.outlook import outlook
    from peftkit.recipe.target import card, has_gpu, this_machine
    from peftkit.registry.store import Registry

    loaded = load(find(recipe))
    resolved = configure(loaded, preset=preset, files=config or (), overrides=settings or ())
    if allow_shorter and budget is None:
        raise typer.BadParameter("--allow-shorter is a consent to what --budget may change; name a budget")
    quant = groups(resolved.config).quant
    elsewhere = gpu is not None or (budget is not None and quant.device != "cpu" and not has_gpu())
    target = card(quant, gpu, budget) if elsewhere else this_machine(quant, budget)
    with Reporter(as_json=as_json) as report:
        cache, registry = locations.cache_root().path, Registry(locations.registry_root().path)
        options: dict[str, Any] = {"fit": budget is not None, "shorter": allow_shorter, "report": report}
        found, changed = outlook(resolved, cache, registry, target, **options)
        if not as_json:
            found.tell(report)
        problem = None
        try:
            found.check_memory(report)
        except OutOfMemory as error:
            problem = error
    different = [f"{key}={value}" for key, value, source in changed.rows() if source.startswith("budget")]
    keys = {text.partition("=")[0] for text in different}
    kept = [text for text in settings or () if text.partition("=")[0] not in keys]
    files = [word for path in config or () for word in ("--config", str(path))]
    command = shlex.join(
        ["peftkit", "train", recipe, *kept, *files, *(["--preset", preset] if preset else []), *different]
    )
    value = {**found.as_record(), "fits": problem is None, "changes": different}
    show(value, as_json=as_json, text=f"to train so: {command}" if different else "")
    if problem is not None:
        raise problem
