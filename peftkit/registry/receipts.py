"""Receipts: what was done to an adapter besides training it, as facts that travel in its manifest.

A receipt is a JSON object with a `type`; the types written so far are below. A reader keeps what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, JsonValue


def _typed(receipt: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if not isinstance(receipt.get("type"), str) or not receipt["type"]:
        raise ValueError("a receipt needs a type")
    return receipt


Receipt = Annotated[dict[str, JsonValue], AfterValidator(_typed)]


def imported(
    source: str, files: Mapping[str, str], left_out: Sequence[str], notes: Sequence[str], bound: str
) -> dict[str, Any]:
    """An adapter came from outside: digests of the files as they came, what was left out, and who named its base.

    `bound` is "user" when the base was named at import, "config" when it is the one its own config names, "manifest"
    when an exported version was imported under another name.
    """
    return {
        "type": "import",
        "source": source,
        "files": dict(files),
        "left_out": list(left_out),
        "notes": list(notes),
        "bound": bound,
    }


def other_base(
    version: str,
    trained_on: Mapping[str, Any],
    used_on: Mapping[str, Any],
    differs: Sequence[str],
    relation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An adapter was used, by an explicit flag, on a base that it was not trained on.

    `relation` is what was measured between the two bases, where it was: its id, median and largest error.
    """
    return {
        "type": "other_base",
        "version": version,
        "trained_on": dict(trained_on),
        "used_on": dict(used_on),
        "differs": list(differs),
        "relation": dict(relation) if relation else None,
    }


def combined(
    method: str,
    options: Mapping[str, float],
    parents: Sequence[Mapping[str, Any]],
    rank: int | None,
    norm: float,
    residual: float,
    max_residual: float,
    converted: Mapping[str, str],
    tensors: Sequence[Mapping[str, Any]],
    search: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Several adapters became this one, by a method on their true ΔW, with these weights.

    `residual` is the relative error ‖ΔW − factors‖ / ‖ΔW‖ of bringing the result to `rank`, 0 where it was not cut;
    `converted` names tensors that had no factors and their kind; `search` holds every set of weights that was tried.
    """
    return {
        "type": "combine",
        "method": method,
        "options": dict(options),
        "parents": [dict(parent) for parent in parents],
        "rank": rank,
        "norm": norm,
        "residual": residual,
        "max_residual": max_residual,
        "converted": dict(converted),
        "tensors": [dict(tensor) for tensor in tensors],
        "search": dict(search) if search is not None else None,
    }


def gated(keep: float, passed: bool, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What each parent's own task kept, on rows that the parent never saw; not measured is not passed.

    `tasks` are by `name@version`: NLLs in nats per answer token with 95 % intervals, the share of the parent's gain
    that was kept, counts and digest of the rows; or `measured` false with the reason.
    """
    return {
        "type": "gate",
        "keep": keep,
        "passed": passed,
        "tasks": {name: dict(task) for name, task in tasks.items()},
    }


def merged(
    versions: Sequence[Mapping[str, Any]],
    method: str,
    options: Mapping[str, float],
    deltas: str,
    base: Mapping[str, str],
    trained_on: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    software: Mapping[str, str],
    weights: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Mapping[str, Any]],
    recommended: Mapping[str, Any] | None,
    files: Mapping[str, Mapping[str, Any]],
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Adapters were added to the weights of their base: onto which, into which format, and what is left of ΔW.

    `versions` are references with weights, combined by `method`; `deltas` is the digest of what was added. `weights`
    are the figures over all tensors, `groups` by kind of delta and form, `tensors` of each: share kept
    ⟨ΔŴ, ΔW⟩ / ‖ΔW‖², entries that rounding left unchanged, norms. `model` compares base + adapter with the merged model
    on each version's held-out rows, or says `measured` false with the reason. `head`, with a task's adapter: the
    tensors of its head were `added`, not merged, and those of the base that it has no place for `left_out`.
    """
    return {
        "type": "merge",
        "versions": [dict(version) for version in versions],
        "method": method,
        "options": dict(options),
        "deltas": deltas,
        "base": dict(base),
        "trained_on": dict(trained_on) if trained_on else None,
        "settings": dict(settings),
        "software": dict(software),
        "weights": dict(weights),
        "groups": {name: dict(figures) for name, figures in groups.items()},
        "tensors": {name: dict(figures) for name, figures in tensors.items()},
        "model": {name: dict(found) for name, found in model.items()},
        "recommended": dict(recommended) if recommended is not None else None,
        "files": {name: dict(facts) for name, facts in files.items()},
        **({"head": dict(head)} if head is not None else {}),
    }


def exported(
    engine: str,
    peftkit: str,
    version: str,
    base: Mapping[str, Any],
    input: Mapping[str, str],
    output: Mapping[str, str],
    findings: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """A version was written for an engine: digests of what went in and came out, and what the engine cannot hold.

    `more` are the figures of that engine's format: for an adapter its rank, what was folded, what a cut rank lost, and
    the error of every tensor read back; for a merged model how it was merged, and what its file keeps of ΔW.
    """
    return {
        "type": "export",
        "engine": engine,
        "peftkit": peftkit,
        "version": version,
        "base": dict(base),
        "input": dict(input),
        "output": dict(output),
        "findings": list(findings),
        **more,
    }
