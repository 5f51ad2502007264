"""`peftkit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations
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
        _evaluate_tasks(
            versions, str(data), settings or [], {"base": base, "bits": bits, "other_base": other_base}, as_json
        )
        return
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
    versions: list[Version], rows: str, settings: list[str], loaded: dict[str, Any], as_json: bool
) -> None:
    spec = resolve(TaskEvaluateSpec, overrides=settings).config
    from peftkit.evaluation.tasks.registered import evaluate_tasks, task_of
    from peftkit.recipe.work.tasks import report_task
    from peftkit.tuning.attach import open_adapters

    with Reporter(as_json=as_json) as report:
        host = open_adapters(versions, locations.cache_root().path, **loaded, report=report)
        comparisons = evaluate_tasks(host, versions, rows, task_of(versions[0]), spec, report=report)
        for comparison in comparisons:
            report_task(comparison, report)
    if as_json:
        figures = {v.reference: c.figures() for v, c in zip(versions, comparisons, strict=True)}
        show(figures, as_json=True, text="")
