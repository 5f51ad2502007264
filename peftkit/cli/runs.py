"""`peftkit runs`: list, show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from peftkit import locations, render
from peftkit.cli.console import show, show_interval
from peftkit.cli.options import AsJson, RunsRoot
from peftkit.runs import list_runs, load_run, read_metrics

app = typer.Typer(
    help="What was run: folders with settings, figures and samples.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_all(runs: RunsRoot = None, as_json: AsJson = False) -> None:
    """List the runs, newest first.

    Example: peftkit runs list
    """
    place = locations.runs_root(runs)
    found = list_runs(place.path)
    rows = [(run.id, run.state, render.duration(run.seconds), run.saved_as or "", run.error or "") for run in found]
    text = render.table(("run", "state", "took", "saved as", "error"), rows) if rows else f"no runs in {place.path}"
    show([asdict(run) for run in found], as_json=as_json, text=text)


@app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help="A run id, or the unique beginning of one.")],
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Show one run: state, loss curve, figures, where its files are.

    Example: peftkit runs show 20260131
    """
    status = load_run(locations.runs_root(runs).path, run)
    losses = [figures["loss"] for _, figures in read_metrics(status.path) if isinstance(figures.get("loss"), float)]
    facts: list[tuple[str, Any]] = [
        ("run", status.id),
        ("recipe", status.recipe),
        ("state", status.state + (f": {status.error}" if status.error else "")),
        ("started", status.started),
        ("took", render.duration(status.seconds)),
        ("saved as", status.saved_as or "nothing"),
        ("folder", str(status.path)),
    ]
    if losses:
        facts.append(("loss", f"{losses[0]:.3f} → {losses[-1]:.3f}  {render.sparkline(losses)}"))
    change = status.figures.get("evaluation", {}).get("other", {}).get("answer_nll_change")
    if change:
        facts.append(("answer NLL, adapter − base", show_interval(change)))
    value = {**asdict(status), "losses": losses}
    show(value, as_json=as_json, text=render.facts(facts))
