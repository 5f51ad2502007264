"""`peftkit combine`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from peftkit import locations, render
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, RegistryRoot, RunsRoot, open_registry
from peftkit.cli.weighted import Adapters, MethodName, MethodSettings, RowFiles, how, parse_rows, parse_weighted

SaveAs = Annotated[str, typer.Option("--save-as", metavar="NAME", help="Name of the new adapter.")]
Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Rank of the result; `exact` keeps all factors and takes none.")
]
Keep = Annotated[
    float | None,
    typer.Option("--gate", metavar="SHARE", help="Register only if every task keeps this share of its gain, as 0.9."),
]
Trials = Annotated[
    int | None, typer.Option("--search", min=1, metavar="TRIALS", help="Look for the weights on held-out rows.")
]


def combine(
    adapters: Adapters,
    save_as: SaveAs,
    method: MethodName = "exact",
    settings: MethodSettings = None,
    rank: Rank = None,
    max_residual: Annotated[
        float, typer.Option("--max-residual", min=0, help="Refuse a result that loses more of ΔW to its rank.")
    ] = 0.05,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what no LoRA can hold, such as norms.")] = False,
    keep: Keep = None,
    trials: Trials = None,
    objective: Annotated[
        Literal["mean", "worst"], typer.Option("--objective", help="With --search: of the tasks' likelihoods.")
    ] = "mean",
    rows: RowFiles = None,
    min_tokens: Annotated[
        int, typer.Option("--min-tokens", min=1, help="Answer tokens below which a task is not measured.")
    ] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --search and of the intervals.")] = 0,
    tags: Annotated[list[str] | None, typer.Option("--tag", metavar="ALIAS", help="Point this alias at it.")] = None,
    base: Base = None,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Combine adapters of one base into one, on their true ΔW; the receipt says what that cost.

    Methods: exact, svd, linear, ties, dare_linear, dare_ties, della, breadcrumbs, slerp, magnitude_prune, knots. All
    but exact bring the result to --rank. Seeds and densities of a method go to --set.

    Example: peftkit combine tickets:0.6 tone:0.4 --save-as both --gate 0.9
    """
    weighted, chosen = parse_weighted(adapters), how(method, settings or [])
    store = open_registry(registry)
    from peftkit.release.combine import combine_adapters
    from peftkit.release.judging import GateSettings, Judging, SearchSettings

    with Reporter(as_json=as_json) as report:
        outcome = combine_adapters(
            store,
            weighted,
            chosen,
            save_as=save_as,
            cache=locations.cache_root().path,
            runs=locations.runs_root(runs).path,
            rank=rank,
            max_residual=max_residual,
            drop=drop,
            keep=None if keep is None else GateSettings(keep, min_tokens),
            search=None if trials is None else SearchSettings(trials, objective, min_tokens),
            judging=Judging(parse_rows(rows or [], [name for name, _ in weighted]), seed=seed),
            base=base,
            aliases=tags or [],
            report=report,
        )
    show(_record(outcome), as_json=as_json, text=_text(outcome))


def _record(outcome: Any) -> dict[str, Any]:
    gate, search = outcome.gate, outcome.search
    return {
        "version": outcome.version.reference,
        "path": str(outcome.version.path),
        "combined": outcome.combined.as_record(),
        "gate": gate.record() if gate else None,
        "search": search.record() if search else None,
    }


def _text(outcome: Any) -> str:
    combined = outcome.combined
    facts = [
        ("  method", combined.how.method),
        ("  of", ", ".join(f"{reference}:{weight:g}" for reference, weight in combined.parents)),
        ("  rank", str(outcome.version.manifest.adapter.get("r"))),
        ("  error of ΔW", f"{combined.residual:.2g} (at most {combined.max_residual:g})"),
    ]
    worst = max(combined.tensors, key=lambda tensor: tensor.residual)
    if worst.residual:
        facts.append(("  most in", f"{worst.name}, {worst.residual:.2g}"))
    return f"{outcome.version.reference} is in the registry\n{render.facts(facts)}"
