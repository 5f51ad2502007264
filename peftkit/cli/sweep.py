"""`peftkit sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot, RunsRoot


def sweep(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe, or the path of your own.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUES", help="a,b or low..high are searched, others fixed.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials in all, those before --resume counted.")] = 16,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="FIGURE:min|max", help="Another figure of a run than the recipe's objective."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the search; the runs have seeds of their own.")] = 0,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu, 8gb, 12gb or 24gb.")] = None,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Stop trials that are behind the median.")] = True,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the sweep; the recipe's and a number by default.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="NAME", help="Go on with a sweep, or join in with another process."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials at once; each takes the memory of a run.")] = 1,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe with many settings, and find the best: optuna's TPE, kept in a folder, gone on with after a kill.

    A key is a setting or its last part; a,b are choices, 1e-5..1e-3 is a range, bases=a,b chooses the base. First come
    the recipe's own settings and the middle of what is searched. Nothing goes to the registry: the best trial's command
    is printed.

    Example: peftkit sweep qlora_sft data.train=tickets.jsonl learning_rate=1e-5..1e-3 r=4,8,16 --trials 20
    """
    from peftkit.recipe.sweeping import continued, started, sweep, sweeps_folder

    given = list(settings or ())
    if resume is not None and recipe is not None and "=" in recipe:  # sweep --resume NAME key=value
        raise typer.BadParameter("name the recipe before settings, or give --resume alone")
    folder = sweeps_folder(locations.runs_root(runs).path)
    asked: dict[str, Any] = {"preset": preset, "metric": metric, "seed": seed, "prune": prune}
    if resume is not None:
        place: Path = continued(folder, resume, recipe, given, **asked)
    elif recipe is None:
        raise typer.BadParameter("name a recipe: peftkit recipes list", param_hint="RECIPE")
    else:
        place = started(folder, name, recipe, given, **asked)
    with Reporter(as_json=as_json) as report:
        result = sweep(place, trials=trials, jobs=jobs, registry=registry, report=report)
        result.tell(report)
    if as_json:
        show(result.record(), as_json=True, text="")
