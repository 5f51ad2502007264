"""What the page tells of an adapter: a manifest and its lineage as plain values, named one by one.

Only what is named here leaves: figures and digests, never a setting's text, an instruction or a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peftkit import render
from peftkit.base.record import plain
from peftkit.registry.index import Summary
from peftkit.registry.lineage import Lineage, Step
from peftkit.registry.manifest import Data, Manifest, Version
from peftkit.serving.page.measured import measures, retention, score, stored

_MOST = 50
"""Lines of a list: a stranger's manifest may name 10,000 parents."""
_MOST_FACTS = 12
_LONGEST = 300


def card(version: Version, found: Lineage | None = None, versions: Sequence[Summary] = ()) -> dict[str, Any]:
    """All that the page shows of a version; `found` is None for one that is in the registry no longer.

    `versions` are those of its name, newest first: where an alias of it may be moved to.
    """
    manifest = version.manifest
    return {
        "name": version.name,
        "version": version.id,
        "created": manifest.created,
        "kind": manifest.kind,
        "bytes": render.size(sum(file.bytes for file in manifest.files.values())),
        "task": _task(manifest),
        "recipe": _text(manifest.recipe.name) if manifest.recipe else None,
        "run": _text(manifest.run),
        "base": _base(manifest),
        "method": _method(manifest),
        "measures": measures(manifest.metrics),
        "retention": retention(manifest.metrics),
        "data": [_data(each) for each in manifest.data[:_MOST]],
        "parents": [each.model_dump() for each in manifest.parents[:_MOST]],
        "ancestors": _steps(found.ancestors) if found else [],
        "descendants": _steps(found.descendants) if found else [],
        "receipts": [_receipt(each) for each in manifest.receipts[:_MOST]],
        "aliases": _aliases(found),
        "moves": [asdict(move) for move in reversed(found.moves[-_MOST:])] if found else [],
        "problems": list(found.problems[:_MOST]) if found else ["this version is no longer in the registry"],
        "versions": [_short(each) for each in versions[:_MOST]],
    }


def row(summary: Summary, served: Sequence[str]) -> dict[str, Any]:
    """A line of the registry's table; `served` are the model names that this version answers to."""
    figures = summary.figures
    return {
        **_short(summary),
        "name": summary.name,
        "base": _text(summary.base),
        "method": _text(summary.method),
        "recipe": _text(summary.recipe),
        "run": _text(summary.run),
        "bytes": render.size(summary.bytes),
        "change": stored(figures, "other.answer_nll_change"),
        "retention": stored(figures, "other.retention_nll_change"),
        "served": list(served),
    }


def _short(summary: Summary) -> dict[str, Any]:
    return {
        "id": summary.id,
        "created": summary.created,
        "score": score(summary),
        "aliases": list(summary.aliases),
        "problem": _text(summary.problem),
    }


def _task(manifest: Manifest) -> str | None:
    """What the adapter was trained to do: its head's kind, else how its answers were scored."""
    head = manifest.adapter.get("head")
    kind = head.get("kind") if isinstance(head, dict) else None
    found = (kind, manifest.metrics.other.get("metric"))
    return next((plain(each.replace("_", " ")) for each in found if isinstance(each, str)), None)


def _base(manifest: Manifest) -> dict[str, Any]:
    base = manifest.base
    return {
        "source": _text(base.source),
        "revision": _text(base.revision),
        "fingerprint": base.fingerprint,
        "license": _text(base.license),
        "trained_in": _text((base.quantization or {}).get("label")),
    }


def _method(manifest: Manifest) -> dict[str, Any]:
    known = {key: manifest.adapter.get(key) for key in ("method", "r", "lora_alpha", "trainable_parameters")}
    targets = manifest.adapter.get("target_modules")
    named = targets[:_MOST] if isinstance(targets, list) else [targets] if targets else []
    scalars = {key: value if isinstance(value, int | float) else _text(value) for key, value in known.items()}
    return {**scalars, "target_modules": [plain(str(each)) for each in named]}


def _data(data: Data) -> dict[str, Any]:
    return {**data.model_dump(), "source": _text(data.source), "license": _text(data.license)}


def _steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [
        {
            "depth": step.depth,
            "reference": step.reference,
            "relation": step.relation,
            "created": step.summary.created if step.summary else None,
            "score": score(step.summary) if step.summary else None,
            "again": step.again,
        }
        for step in steps[:_MOST]
    ]


def _receipt(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Its type and the plain values at its top; what fills files, such as every tensor's figures, is only counted."""
    values = {key.replace("_", " "): value for key, value in receipt.items() if key != "type"}
    facts = [(key, _fact(value)) for key, value in values.items() if isinstance(value, str | int | float)]
    counts = [(key, f"{len(value):,} recorded") for key, value in values.items() if isinstance(value, list | dict)]
    return {"type": plain(str(receipt["type"])), "facts": [*facts, *counts][:_MOST_FACTS]}


def _fact(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value) if isinstance(value, str) else render.number(value)


def _aliases(found: Lineage | None) -> dict[str, str]:
    """Where each alias of the name points: what its newest record says."""
    newest = {move.alias: move for move in sorted(found.moves if found else (), key=lambda move: move.number)}
    return {alias: move.version for alias, move in sorted(newest.items()) if move.version is not None}


def _text(value: Any) -> str | None:
    """A stranger's text on one line that is not too long; None for what is no text."""
    return plain(value, _LONGEST) if isinstance(value, str) else None
