"""`peftkit doctor`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit import locations, render
from peftkit.atomic import replace_file
from peftkit.base.ref import BaseSpec
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base
from peftkit.environment import hardware, versions

if TYPE_CHECKING:
    from peftkit.recipe.examine import Examination
    from peftkit.recipe.verdict import Check


def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Examine the card: gradients, memory against plan, speed; five minutes.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Try the procedure of --gpu on the CPU.")] = False,
    base: Base = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the figures; peftkit-doctor-CARD.json by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, GPU, the bitsandbytes path really used, memory, disk, and where things live.

    Example: peftkit doctor --gpu
    """
    if gpu or cpu:
        _examine("cpu" if cpu else "cuda", base, out, as_json)
        return
    if base or out:
        raise typer.BadParameter("--base and --out belong to --gpu (or --cpu)")
    from peftkit.backbone.diagnose import diagnose

    places = {
        "registry": locations.registry_root(),
        "runs": locations.runs_root(),
        "cache": locations.cache_root(),
    }
    facts: list[tuple[str, Any]] = [*versions().items(), *hardware().items(), *diagnose().items()]
    facts += _cpu().items()
    for name, place in places.items():
        facts.append((name, f"{place.path}  ({place.reason})"))
        parent = next(p for p in (place.path, *place.path.parents) if p.exists())
        facts.append((f"free disk for {name}", render.size(shutil.disk_usage(parent).free)))
    show(dict(facts), as_json=as_json, text=render.facts(facts))


def _cpu() -> dict[str, str]:
    """Threads, and whether bfloat16 is faster on this CPU."""
    from peftkit.backbone.measured import measure
    from peftkit.backbone.threads import settle_threads

    threads = settle_threads()  # as a backbone does when it is loaded
    found = measure()
    hint = "; to use it: quant.compute_dtype=measured" if found.faster else ""
    return {
        "threads": f"{threads.choice} ({threads.reason})",
        "products on the CPU": found.text + hint,
    }


def _examine(device: Any, base: str | None, out: Path | None, as_json: bool) -> None:
    """Examine the card, keep the figures in a file, and end with 1 when a check failed."""
    from peftkit.recipe.examine import examine

    spec = BaseSpec(source=base) if base else BaseSpec()
    with Reporter(as_json=as_json) as report:
        found = examine(spec, locations.cache_root().path, device, report=report)
    record = found.as_record()
    path = out or Path(f"peftkit-doctor-{_slug(found.facts['card'])}.json")
    replace_file(path, json.dumps(record, indent=2, default=str) + "\n")
    show(record, as_json=as_json, text=_text(found, path))
    if found.failed:
        raise typer.Exit(1)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _text(found: Examination, path: Path) -> str:
    """A row for each way to hold the base, a row for each shape, and what failed with what to do."""
    singles = ("weights", *(check.what for check in found.checks if check.what.startswith("first step")))
    arithmetic = ("unpacked weights", "gradients", "a planted error", "evaluation against training")
    shapes = ("step", "evaluation", "training", "answering")
    parts = [
        "relative error, and what is allowed; a planted error must be above it\n" + _pivot(found, arithmetic),
        "memory and tokens/s: measured, and in brackets planned\n" + _pivot(found, shapes),
        "\n".join(f"{check.name}: {_cell(check)}" for check in found.checks if check.what in singles),
    ]
    skipped = [f"left out: {check.name} ({check.source})" for check in found.checks if check.state == "left out"]
    troubles = [
        f"! {check.name}: {_figure(check.measured, check.unit)}, allowed {_bounds(check)} ({check.source})\n"
        f"  what to do: {check.hint}"
        for check in found.failed
    ]
    judged = sum(check.state in ("ok", "failed") for check in found.checks)
    count = f"{len(found.failed)} of {judged} checks failed" if troubles else f"all {judged} checks hold"
    parts += ["\n".join(lines) for lines in (skipped, troubles) if lines]
    return "\n\n".join([*parts, f"{count}; the figures are kept in {path}"])


def _pivot(found: Examination, names: tuple[str, ...]) -> str:
    """One row for each subject that has one of these figures, one column a figure."""
    cells = {(check.of, check.what): _cell(check) for check in found.checks if check.what in names}
    subjects = dict.fromkeys(of for of, _ in cells)
    return render.table(["", *names], [[of, *(cells.get((of, name), "") for name in names)] for of in subjects], 64)


def _cell(check: Check) -> str:
    mark = " FAILED" if check.state == "failed" else ""
    text = _figure(check.measured, check.unit)
    if check.expected is not None:
        return f"{text} ({_figure(check.expected, check.unit)}){mark}"
    bound = check.high if check.low is None else check.low
    return f"{text} ({_figure(bound, check.unit)}){mark}" if bound is not None else text


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return render.size(value)
    return f"{value:.1e}" if unit == "relative error" else render.number(value)


def _bounds(check: Check) -> str:
    low, high = (_figure(value, check.unit) for value in (check.low, check.high))
    if check.low is None:
        return f"at most {high}"
    return f"at least {low}" if check.high is None else f"{low} to {high}"
