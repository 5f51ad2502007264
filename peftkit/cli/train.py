"""`peftkit train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit import locations, render
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot, RunsRoot
from peftkit.config import dump_yaml
from peftkit.recipe import configure, execute, find, load

_EPILOG = (
    "Example: peftkit train qlora_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl save_as=tickets\n\n"
    "Settings: peftkit recipes show qlora_sft"
)


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or the path of your own.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings.")] = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="YAML file with settings.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu, 8gb, 12gb or 24gb.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Audit and plan, train nothing.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show every setting and its source.")] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Let init_from name an adapter of another base; this is recorded.")
    ] = False,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: audit, plan, train, measure base against adapter, keep the adapter."""
    loaded = load(find(recipe))
    resolved = configure(loaded, preset=preset, files=config or (), overrides=settings or ())
    if print_config:
        rows = [(key, dump_yaml(value).strip().removesuffix("\n..."), source) for key, value, source in resolved.rows()]
        value = {key: {"value": value, "source": source} for key, value, source in resolved.rows()}
        show(value, as_json=as_json, text=render.table(("setting", "value", "from"), rows))
        return
    with Reporter(as_json=as_json) as report:
        if not as_json and not dry_run:
            for what, place in (("registry", locations.registry_root(registry)), ("runs", locations.runs_root(runs))):
                report.console.print(f"  {what}: {place.path}  ({place.reason})", markup=False)
        places = {"registry": registry, "runs": runs}
        result = execute(loaded, resolved, **places, report=report, dry_run=dry_run, other_base=other_base)
    if as_json:
        show({"run": result.run_id, "saved_as": result.saved_as, **result.figures}, as_json=True, text="")


train.__doc__ = f"{train.__doc__}\n\n{_EPILOG}"
