"""`peftkit train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations, render
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot, RunsRoot
from peftkit.config import dump_yaml
from peftkit.process_group import launched
from peftkit.recipe import configure, execute, find, load, recipe_and_settings
from peftkit.runs import RunStatus

_EPILOG = (
    "Example: peftkit train qlora_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl save_as=tickets\n\n"
    "Settings: peftkit recipes show qlora_sft"
)


def train(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe, or the path of your own.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings.")] = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="YAML file with settings.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu, 8gb, 12gb or 24gb.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Audit, plan, load the base and try the longest rows; train nothing.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="First find the fastest settings that fit into so much, such as 12GB."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show every setting and its source.")] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Let init_from name an adapter of another base; this is recorded.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Go on with an interrupted run and its recipe."),
    ] = None,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: audit, plan, train, measure base against adapter, keep the adapter."""
    given = list(settings or ())
    if recipe is not None and resume is not None and "=" in recipe:  # train --resume RUN key=value
        given, recipe = [recipe, *given], None
    status: RunStatus | None = None
    if resume is not None:
        if preset or dry_run or budget:
            raise typer.BadParameter("a run is resumed as it began: no --preset, --budget or --dry-run with --resume")
        root, file = locations.runs_root(runs).path, find(recipe) if recipe else None
        status, loaded, resolved = recipe_and_settings(root, resume, recipe=file, files=config or (), overrides=given)
    elif recipe is None:
        raise typer.BadParameter("name a recipe: peftkit recipes list", param_hint="RECIPE")
    else:
        loaded = load(find(recipe))
        resolved = configure(loaded, preset=preset, files=config or (), overrides=given)
    if print_config:
        rows = [(key, dump_yaml(value).strip().removesuffix("\n..."), source) for key, value, source in resolved.rows()]
        value = {key: {"value": value, "source": source} for key, value, source in resolved.rows()}
        show(value, as_json=as_json, text=render.table(("setting", "value", "from"), rows))
        return
    with Reporter(as_json=as_json) as report:
        if not as_json and not dry_run and launched().leads:
            for what, place in (("registry", locations.registry_root(registry)), ("runs", locations.runs_root(runs))):
                report.console.print(f"  {what}: {place.path}  ({place.reason})", markup=False)
        options: dict[str, Any] = {"dry_run": dry_run, "other_base": other_base, "resume": status, "budget": budget}
        result = execute(loaded, resolved, registry=registry, runs=runs, report=report, **options)
    if as_json and launched().leads:
        show({"run": result.run_id, "saved_as": result.saved_as, **result.figures}, as_json=True, text="")


train.__doc__ = f"{train.__doc__}\n\n{_EPILOG}"
