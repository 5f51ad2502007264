"""`peftkit merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peftkit import locations, render
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, RegistryRoot, RunsRoot, open_registry
from peftkit.cli.weighted import Adapters, MethodName, MethodSettings, RowFiles, how, parse_rows, parse_weighted
from peftkit.planning.devices import parse_size
from peftkit.recipe import Interrupted

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new or empty folder.")]
OntoWeights = Annotated[
    Literal["original", "dequantized"] | None,
    typer.Option("--onto", help="The base's files, or what a quantized training computed with; asked for if open."),
]
Dtype = Annotated[
    Literal["keep", "float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of all float tensors.")
]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Most of one file, such as 5GB.")]
Quantize = Annotated[
    Literal["nf4", "fp4", "int8"] | None,
    typer.Option("--quantize", help="Write linear layers in few bits, as a bitsandbytes upload."),
]
Rounding = Annotated[
    Literal["nearest", "stochastic"],
    typer.Option("--rounding", help="With --quantize: stochastic keeps small deltas, on average."),
]


def merge(
    adapters: Adapters,
    out: Out,
    onto: OntoWeights = None,
    method: MethodName = "exact",
    settings: MethodSettings = None,
    dtype: Dtype = "keep",
    shard_size: ShardSize = "5GB",
    quantize: Quantize = None,
    rounding: Rounding = "nearest",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of stochastic rounding and of the intervals.")] = 0,
    rows: RowFiles = None,
    gate: Annotated[bool, typer.Option("--gate", help="Publish only what was measured and is not worse.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Publish a result that lost much of the adapter too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be changed, written and needed.")] = False,
    base: Base = None,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into the weights of their base, one tensor at a time, with a receipt.

    Every merged number is computed in float64 and rounded once. A merge that was interrupted goes on where it stopped.
    The receipt, peftkit_merge.json, says how much of ΔW is left and, on held-out rows, how the answers moved.

    Example: peftkit merge tickets --onto original --out ./merged
    """
    weighted, chosen = parse_weighted(adapters), how(method, settings or [])
    store = open_registry(registry)
    from peftkit.deltas.merging.building import Building
    from peftkit.release.judging import Judging
    from peftkit.release.merge import Order, merge_adapters, plan_adapters

    written: dict[str, Any] = {"dtype": dtype, "shard_size": parse_size(shard_size), "seed": seed}
    written |= {"quantize": quantize, "rounding": rounding, "force": force}
    order = Order(weighted, chosen, onto, written, base, gate)
    cache, target = locations.cache_root().path, out.expanduser()
    with Reporter(as_json=as_json) as report:
        if dry_run:
            plan, decided = plan_adapters(store, order, target, cache=cache, report=report)
            show(_plan_record(plan, decided), as_json=as_json, text=_plan_text(plan, onto))
            plan.check_room()
            return
        judging = Judging(parse_rows(rows or [], [name for name, _ in weighted]), seed=seed)
        try:
            receipt = merge_adapters(
                store,
                order,
                target,
                cache=cache,
                runs=locations.runs_root(runs).path,
                judging=judging,
                report=report,
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; the same command goes on where it stopped, rm -r {Building(target).folder} gives it up"
            ) from None
    record = receipt.as_record()
    show(record, as_json=as_json, text=_text(record, target))


def _plan_record(plan: Any, settings: Any) -> dict[str, Any]:
    names = ("tensors", "files", "bytes_out", "peak_memory", "memory_free", "disk_needed", "disk_free")
    return {"changed": list(plan.changed), **{name: getattr(plan, name) for name in names}} | {
        "settings": settings.model_dump()
    }


def _plan_text(plan: Any, onto: str | None) -> str:
    facts = [
        ("  onto", onto or "open: --onto original or --onto dequantized, where the adapter was trained in few bits"),
        ("  tensors", f"{len(plan.changed)} of {plan.tensors} are changed: {', '.join(plan.changed[:3])} …"),
        ("  files", f"{len(plan.files)}, {render.size(plan.bytes_out)}"),
        ("  memory", f"{render.size(plan.peak_memory)} above the program's own, {render.size(plan.memory_free)} free"),
        ("  disk", f"{render.size(plan.disk_needed)} needed, {render.size(plan.disk_free)} free"),
    ]
    return "nothing was written (--dry-run)\n" + render.facts(facts)


def _text(record: dict[str, Any], out: Path) -> str:
    weights = record["weights"]
    share, same = weights["kept"], weights["unchanged"] / max(weights["entries"], 1)
    facts = [
        ("  onto", record["settings"]["onto"]),
        ("  ΔW kept", "there is none" if share is None else f"{share:.2%}, noise {weights['noise']:.2g} of ‖ΔW‖"),
        ("  left unchanged by rounding", f"{same:.1%} of the entries that ΔW touches"),
        ("  ‖ΔW‖ / ‖W‖", f"{weights['delta_to_base']:.2%}" if weights["delta_to_base"] else "-"),
    ]
    if head := record.get("head"):
        added = ", ".join(head["added"]) or "nothing: the base's files hold tensors of its shape"
        facts.append((f"  {head['kind']} head", f"added, not merged: {added}"))
        if head["left_out"]:
            facts.append(("    left out of the base", ", ".join(head["left_out"][:3])))
    for name, found in record["model"].items():
        facts += _model(name, found)
    return f"{out} holds the merged model\n{render.facts(facts)}"


def _model(name: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured on one adapter's rows."""
    if not found["measured"]:
        return [(f"  {name}", found["reason"])]
    if "outputs" in found:
        moved = found["outputs"]
        facts = [
            (f"  {name}: outputs, merged − attached", f"{moved['largest']:.2g} at most, of {moved['size']:.2g}"),
            ("    on", found["inputs"]),
        ]
        return facts + ([("    same first choice", f"{found['same_choice']:.2%}")] if found["same_choice"] else [])
    change = found["nll_change"]
    return [
        (
            f"  {name}: NLL, merged − attached",
            f"{change['point']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f}) "
            f"on {found['answer_tokens']:,} answer tokens",
        ),
        ("    KL(attached ‖ merged)", f"{found['kl']['mean']:.2g} nats per token, {found['kl']['max']:.2g} at most"),
        ("    same first choice", f"{found['top1_agreement']:.2%} of the tokens"),
    ]
