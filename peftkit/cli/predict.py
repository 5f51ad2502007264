"""`peftkit predict`: what adapters of a task say of every row of a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, harmless, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry
from peftkit.config import resolve
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec

_SHOWN = 10


def predict(
    names: Annotated[list[str], typer.Argument(metavar="NAME… FILE", help="Adapters of one task, then rows.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the JSON lines go.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="Column of the text.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", metavar="COLUMN", help="Column of the second text.")] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B,…", help="Columns of a csv without a header line.")
    ] = None,
    too_long: Annotated[
        str | None, typer.Option("--too-long", metavar="POLICY", help="raise, drop, truncate or windows.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Settings of a task's `evaluate.*`, without the prefix."),
    ] = None,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Label, tag, answer or number every row of a file; each adapter on the same loaded base.

    Example: peftkit predict topics mails.csv --out labels.jsonl
    """
    *adapters, source = names
    if not adapters:
        raise typer.BadParameter("name at least one adapter and a file", param_hint="NAME… FILE")
    if out is not None and out.exists() and not overwrite:
        raise typer.BadParameter(f"{out} exists; --overwrite replaces it", param_hint="--out")
    asked_for = resolve(TaskEvaluateSpec, overrides=settings or [])
    store = open_registry(registry)
    versions = [store.resolve(name) for name in adapters]
    from peftkit.evaluation.registered.recorded import measured_as
    from peftkit.evaluation.tasks.registered import predict_rows, task_of, write_predictions
    from peftkit.tuning.attach import open_adapters

    asked = {"text": text, "pair": pair, "columns": tuple(columns.split(",")) if columns else None}
    spec, measure = task_of(versions[0], **asked, too_long=too_long), measured_as(versions[0], asked_for)
    with Reporter(as_json=as_json) as report:
        cache = locations.cache_root().path
        host = open_adapters(versions, cache, base=base, bits=bits, other_base=other_base, report=report)
        predicted = predict_rows(host, versions, source, spec, measure, report=report)
    records = predicted.records()
    if out is not None:
        write_predictions(predicted, out)
    lines = [f"{len(records):,} rows" + (f" in {out}" if out is not None else "")]
    for name, given in predicted.by_name.items():
        if predicted.labels and all(isinstance(each.value, str) for each in given):
            counts = Counter(str(each.value) for each in given).most_common(_SHOWN)
            lines.append(f"{name}: " + ", ".join(f"{label} {count}" for label, count in counts))
    if out is None:
        for record in records[:_SHOWN]:
            said = "; ".join(f"{name}: {one['value']}" for name, one in record["predictions"].items())
            lines.append(harmless(f"  {record['where']}  {said}"))
        if len(records) > _SHOWN:
            lines.append(f"  and {len(records) - _SHOWN:,} more: --out FILE keeps all")
    show(records, as_json=as_json, text="\n".join(lines))
