"""`peftkit runs`: list, show, compare, rm, gc; and `peftkit report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations, render
from peftkit.atomic import replace_file
from peftkit.cli.console import show, show_interval
from peftkit.cli.options import AsJson, RunsRoot
from peftkit.errors import RunError
from peftkit.plain import as_plain
from peftkit.runs import list_runs, load_run, read_metrics
from peftkit.runs.comparing import RunComparison, compare_runs
from peftkit.runs.contents import as_text, checkpoint_steps, held
from peftkit.runs.page import PAGE, run_page
from peftkit.runs.records import last_figures
from peftkit.runs.removing import Removed, collect, remove_runs

app = typer.Typer(
    help="What was run: folders with settings, figures and samples.", no_args_is_help=True, rich_markup_mode=None
)
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run id, or the unique beginning of one.")]


@app.command("list")
def list_all(runs: RunsRoot = None, as_json: AsJson = False) -> None:
    """List the runs, newest first, with the disk they hold.

    Example: peftkit runs list
    """
    place = locations.runs_root(runs)
    found = list_runs(place.path)
    disks = [held(run.path) for run in found]
    losses = [last_figures(run.path).get("loss") for run in found]
    columns = ("run", "state", "took", "loss", "checkpoints", "disk", "saved as", "error")
    rows = [
        (run.id, run.state, render.duration(run.seconds), loss,
         render.size(disk.checkpoints) if disk.checkpoints else "", render.size(disk.total), run.saved_as or "",
         run.error or "")
        for run, disk, loss in zip(found, disks, losses, strict=True)
    ]  # fmt: skip
    total = f"\n\n{render.size(sum(disk.total for disk in disks))} in {place.path}"
    text = render.table(columns, rows) + total if rows else f"no runs in {place.path}"
    value = [
        {**asdict(run), "final_loss": loss, "bytes": disk.total, "checkpoint_bytes": disk.checkpoints}
        for run, disk, loss in zip(found, disks, losses, strict=True)
    ]
    show(as_plain(value), as_json=as_json, text=text)


@app.command("show")
def show_run(run: RunName, runs: RunsRoot = None, as_json: AsJson = False) -> None:
    """Show one run: state, loss curve, figures, where its files are.

    Example: peftkit runs show 20260131
    """
    status = load_run(locations.runs_root(runs).path, run)
    losses = [figures["loss"] for _, figures in read_metrics(status.path) if "loss" in figures]
    disk, steps = held(status.path), checkpoint_steps(status.path)
    facts: list[tuple[str, Any]] = [
        ("run", status.id),
        ("recipe", status.recipe),
        ("state", status.state + (f": {status.error}" if status.error else "")),
        ("started", status.started),
        *([("resumed", ", ".join(status.resumed))] if status.resumed else []),
        ("took", render.duration(status.seconds)),
        ("saved as", status.saved_as or "nothing"),
        ("checkpoints", f"steps {', '.join(map(str, steps))}" if steps else "none"),
        ("disk", f"{render.size(disk.total)}, of it checkpoints {render.size(disk.checkpoints)}"),
        ("folder", str(status.path)),
    ]
    if losses:
        facts.append(("loss", f"{losses[0]:.3f} → {losses[-1]:.3f}  {render.sparkline(losses)}"))
    evaluation = status.figures.get("evaluation")
    change = evaluation.get("other", {}).get("answer_nll_change") if isinstance(evaluation, dict) else None
    if change:
        facts.append(("answer NLL, adapter − base", show_interval(change)))
    value = {**asdict(status), "losses": losses, "bytes": disk.total, "checkpoint_bytes": disk.checkpoints}
    show(as_plain(value), as_json=as_json, text=render.facts(facts))


@app.command("compare")
def compare(
    run: Annotated[list[str], typer.Argument(metavar="RUN RUN …", help="Run ids, or unique beginnings.")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write the comparison as one page.")] = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: settings and data that differ, figures, losses.

    Example: peftkit runs compare 20260131 20260202 --html both.html
    """
    root = locations.runs_root(runs).path
    found = {status.id: status for status in (load_run(root, name) for name in run)}
    if len(found) < 2:
        raise RunError("one run cannot be compared with itself", expected="two runs or more", hint="peftkit runs list")
    compared = compare_runs(list(found.values()))
    if html:
        _write(html, compared.as_html())
    show(as_plain(asdict(compared)), as_json=as_json, text=_compared(compared) + (f"\n\n{html}" if html else ""))


@app.command("rm")
def rm(
    run: Annotated[list[str], typer.Argument(metavar="RUN …", help="Run ids, or unique beginnings.")],
    force: Annotated[bool, typer.Option("--force", help="Also what was learned and is nowhere else.")] = False,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Remove runs with all their files; not one in progress.

    Example: peftkit runs rm 20260131
    """
    removed = remove_runs(locations.runs_root(runs).path, run, force=force)
    _show_removed(removed, "removed", as_json)


@app.command("gc")
def gc(
    older_than: Annotated[
        int | None,
        typer.Option("--older-than", metavar="DAYS", min=1, help="Also checkpoints of older runs that could resume."),
    ] = None,
    trunks: Annotated[
        bool, typer.Option("--trunks", help="Also cached trunks (train.trunk_cache), which a run computes again.")
    ] = False,
    encoded: Annotated[
        bool, typer.Option("--encoded", help="Also encoded rows in the cache, which a run encodes again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list.")] = False,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints of saved runs and what dead processes left; settings, figures and events stay.

    Example: peftkit runs gc --dry-run
    """
    age = timedelta(days=older_than) if older_than else None
    removed = collect(locations.runs_root(runs).path, older_than=age, dry_run=dry_run)
    if trunks:
        from peftkit.training.trunk.store import TrunkStore  # loads torch

        store = TrunkStore(locations.cache_root().path)
        cached = store.kept() if dry_run else store.remove()
        removed = replace(removed, paths=(*removed.paths, *((str(each.path), each.bytes) for each in cached)))
    if encoded:
        from peftkit.data.encoded_store import EncodedStore

        rows = EncodedStore(locations.cache_root().path)
        found = rows.kept() if dry_run else rows.remove()
        removed = replace(removed, paths=(*removed.paths, *((str(each.path), each.bytes) for each in found)))
    _show_removed(removed, "would remove" if dry_run else "removed", as_json)


def report(
    run: RunName,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write it; the run's folder without it.")] = None,
    runs: RunsRoot = None,
) -> None:
    """Write a run's page, one HTML file that needs no network, and print where it is.

    Example: peftkit report 20260131 --out report.html
    """
    status = load_run(locations.runs_root(runs).path, run)
    target = out or status.path / PAGE
    _write(target, run_page(status.path))
    show(None, as_json=False, text=str(target))


def _write(target: Path, text: str) -> None:
    try:
        replace_file(target, text)
    except OSError as error:
        raise RunError(
            f"{target} cannot be written: {error.strerror or error}",
            expected="a file in a folder that exists and can be written",
        ) from error


def _show_removed(removed: Removed, verb: str, as_json: bool) -> None:
    count = len(removed.paths)
    lines = [f"{verb} {count} {'entry' if count == 1 else 'entries'}, {render.size(removed.bytes)}"]
    lines += [f"{path}  {render.size(size)}" for path, size in removed.paths]
    lines += [f"left: {path}: {why}" for path, why in removed.kept]
    entries = [{"path": path, "bytes": size} for path, size in removed.paths]
    left = [{"path": path, "why": why} for path, why in removed.kept]
    value = {"removed": entries, "left": left, "bytes": removed.bytes, "dry_run": verb.startswith("would")}
    show(value, as_json=as_json, text="\n".join(lines))


def _compared(compared: RunComparison) -> str:
    names = [run.id for run in compared.runs]
    parts: list[tuple[str, Sequence[Sequence[Any]]]] = [
        ("", [("state", *(run.state for run in compared.runs)),
              ("took", *(render.duration(run.seconds) for run in compared.runs)),
              ("loss", *(render.sparkline([loss for _, loss in curve], 24) for curve in compared.losses)),
              ("last loss", *(curve[-1][1] if curve else None for curve in compared.losses))]),
        ("figures", _cells(compared.figures)),
        ("settings that differ", _cells(compared.settings)),
        ("data", _cells(compared.data)),
        ("versions and machine that differ", _cells(compared.environment)),
    ]  # fmt: skip
    return "\n\n".join(
        f"{title}\n{render.table(('', *names), rows)}".lstrip() if rows else f"{title}: none" for title, rows in parts
    )


def _cells(rows: Sequence[tuple[str, tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    return [(name, *map(as_text, values)) for name, values in rows]
