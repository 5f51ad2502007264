"""`peftkit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.asking import refuse
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry
from peftkit.config import resolve
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.recipe import report_comparison
from peftkit.registry.store import Version


def evaluate(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Adapters to measure against their base.")],
    data: Annotated[Path, typer.Option("--data", help="Held-out rows.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Settings of `evaluate.*`, without the prefix."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="Of a task: the text's column.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", metavar="COLUMN", help="Of a task: the second text's.")] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Of a task: the label's.")] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B,…", help="Of a task: columns of a csv without a header.")
    ] = None,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Measure base and adapters on the same rows, with intervals; adapters of a task by its own metrics.

    Example: peftkit eval tickets sql --data held_out.jsonl
    """
    store = open_registry(registry)
    versions = [store.resolve(name) for name in names]
    if "head" in versions[0].manifest.adapter:
        rows = {"text": text, "pair": pair, "label": label, "columns": tuple(columns.split(",")) if columns else None}
        loaded = {"base": base, "bits": bits, "other_base": other_base}
        _evaluate_tasks(versions, str(data), rows, settings or [], loaded, as_json)
        return
    refuse({"--text": text, "--pair": pair, "--label": label, "--columns": columns}, f"{names[0]} answers in words")
    spec = resolve(EvaluateSpec, overrides=settings or []).config
    from peftkit.evaluation.registered import evaluate_attached
    from peftkit.tuning.attach import open_adapters

    cache = locations.cache_root().path
    with Reporter(as_json=as_json) as report:
        host = open_adapters(versions, cache, base=base, bits=bits, other_base=other_base, report=report)
        comparisons = evaluate_attached(host, versions, data, spec, report=report)
        for comparison in comparisons:
            report_comparison(comparison, report)
    if as_json:
        measured = zip(versions, comparisons, strict=True)
        figures = {v.reference: {**c.figures(), "receipts": list(host.receipts)} for v, c in measured}
        show(figures, as_json=True, text="")


def _evaluate_tasks(
    versions: list[Version],
    source: str,
    rows: dict[str, Any],
    settings: list[str],
    loaded: dict[str, Any],
    as_json: bool,
) -> None:
    asked = resolve(TaskEvaluateSpec, overrides=settings)
    from peftkit.evaluation.tasks.registered import evaluate_tasks, measured_as, task_of
    from peftkit.recipe.work.tasks import report_task
    from peftkit.tuning.attach import open_adapters

    with Reporter(as_json=as_json) as report:
        host = open_adapters(versions, locations.cache_root().path, **loaded, report=report)
        task, spec = task_of(versions[0], **rows), measured_as(versions[0], asked)
        comparisons = evaluate_tasks(host, versions, source, task, spec, report=report)
        for version, comparison in zip(versions, comparisons, strict=True):
            report_task(comparison, report, version.reference)
    if as_json:
        figures = {v.reference: c.figures() for v, c in zip(versions, comparisons, strict=True)}
        show(figures, as_json=True, text="")
