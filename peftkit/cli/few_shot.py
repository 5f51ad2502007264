"""`peftkit few-shot`."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot, RunsRoot


def few_shot(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or the path of your own.")],
    settings: Annotated[
        list[str], typer.Argument(metavar="n=8,16,32 KEY=VALUE", help="Numbers of training rows, and settings.")
    ],
    draws: Annotated[int, typer.Option("--draws", min=1, help="Draws of the training rows for each n.")] = 5,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu, 8gb, 12gb or 24gb.")] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="FIGURE:min|max", help="Another figure of a run than the recipe's objective."),
    ] = None,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Train on n rows, several times drawn, and measure each on the same held-out rows: how much data is enough?

    The mean over draws stands with its interval over draws, and beside it the interval over held-out rows. The same
    command again goes on where it was stopped. Nothing goes to the registry.

    Example: peftkit few-shot qlora_sft data.train=tickets.jsonl n=8,16,32,64,128 --draws 5
    """
    from peftkit.recipe.few_shot import few_shot, few_shot_folder, read_few_shot

    asked = read_few_shot(recipe, settings, draws=draws, preset=preset, metric=metric)
    folder = few_shot_folder(locations.runs_root(runs).path, asked)
    with Reporter(as_json=as_json) as report:
        curve = few_shot(folder, asked, registry=registry, report=report)
        curve.tell(report)
    if as_json:
        show(curve.record(), as_json=True, text="")
