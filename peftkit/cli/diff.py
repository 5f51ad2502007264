"""`peftkit diff`: what differs between two adapters, as their manifests and their delta weights say."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit import locations, render
from peftkit.base.record import BaseRecord, plain
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot, open_registry
from peftkit.errors import PeftkitError, RegistryError
from peftkit.registry.bases import record_of
from peftkit.registry.difference import ABSENT, Difference, Row, difference
from peftkit.registry.manifest import Version

if TYPE_CHECKING:
    from peftkit.deltas.compare import DeltaComparison
    from peftkit.deltas.spectrum import Angles

_MOST_ROWS = 200
_MOST_TENSORS = 10
_WIDEST = 400
_ROUNDING = 1e-12  # of float64, over what a QR of some thousand rows adds up
_WIDEST_CELL, _BEFORE = 40, 12


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="name, name@version or name@alias.")],
    right: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    no_weights: Annotated[bool, typer.Option("--no-weights", help="Leave the delta weights out; no torch.")] = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs between two versions: base, settings, data, metrics, files, and their delta weights.

    Delta weights are compared when the two have one base and its files are on this machine; nothing is downloaded.

    Example: peftkit diff tickets@prod tickets
    """
    store = open_registry(registry)
    one, other = store.resolve(left), store.resolve(right)
    notes: list[str] = []
    records = [_record(each, notes) for each in (one, other)]
    found = difference(one, other, left_base=records[0], right_base=records[1])
    weights, missing = (None, "--no-weights") if no_weights else _weights(one, other, as_json)
    value = {**asdict(found), "rows": [row.as_json() for row in found.rows], "notes": notes}
    value |= {"weights": weights.as_record() if weights else None, "weights_missing": missing}
    text = [_difference(found), *notes]
    if weights:
        text += ["", _weights_text(weights)]
    elif not no_weights:
        text += ["", f"delta weights are not compared: {plain(missing, _WIDEST)}"]
    show(value, as_json=as_json, text="\n".join(text))


def _weights(one: Version, other: Version, as_json: bool) -> tuple[DeltaComparison | None, str]:
    """How the delta weights differ, or why that is not told: an adapter can be looked at without its base."""
    from peftkit.cli.base_here import base_here, check_one_base, deltas_here

    cache = locations.cache_root().path
    try:
        check_one_base([one, other])
        with Reporter(as_json=as_json, warnings_only=True) as report:
            folder = base_here(one, cache, report)
        from peftkit.deltas.compare import compare_deltas

        return compare_deltas(deltas_here(one, folder), deltas_here(other, folder)), ""
    except PeftkitError as error:
        return None, error.fact


def _weights_text(found: DeltaComparison) -> str:
    far = sorted(found.tensors, key=lambda each: (-_apart(each.distance.relative), each.name))[:_MOST_TENSORS]
    every = found.overall
    if (
        _apart(every.relative) <= _ROUNDING
        and not found.not_compared
        and all(_apart(each.distance.relative) <= _ROUNDING for each in found.tensors)
    ):
        return f"delta weights: the same in all {len(found.tensors)} tensors, ‖ΔW‖ {render.number(every.left_norm)}"
    rows: list[tuple[Any, ...]] = [("all", every.left_norm, every.right_norm, every.relative, every.cosine, None, None)]
    for each in far:
        distance = each.distance
        figures = (distance.left_norm, distance.right_norm, distance.relative, distance.cosine)
        rows.append((each.name, *figures, _shown(each.write), _shown(each.read)))
    columns = ("delta weights", "‖A‖", "‖B‖", "‖A − B‖ / ‖A‖", "cosine", "write", "read")
    lines = [render.table(columns, rows)]
    if len(far) < len(found.tensors):
        lines.append(f"the {len(far)} furthest apart of {len(found.tensors)} tensors; --json has all")
    lines.append("write, read: mean cosine of the principal angles between what they write to and read from")
    for side, names in (("A", found.only_left), ("B", found.only_right)):
        if names:
            lines.append(f"only {side} changes {len(names)}: {plain(', '.join(names), _WIDEST)}")
    for why in dict.fromkeys(found.not_compared.values()):
        refused = [name for name, reason in found.not_compared.items() if reason == why]
        lines.append(f"not compared: {plain(', '.join(refused), _WIDEST)}: {plain(why, _WIDEST)}")
    return "\n".join(lines)


def _apart(relative: float | None) -> float:
    return float("inf") if relative is None else relative


def _shown(angles: Angles | None) -> float | None:
    return angles.mean if angles else None


def _difference(found: Difference) -> str:
    rows = [(row.section, row.key, *_sides(row), render.number(row.change)) for row in found.rows[:_MOST_ROWS]]
    lines = [render.facts([("A", found.left), ("B", found.right)]), ""]
    lines.append(render.table(("", "", "A", "B", "B − A"), rows, _WIDEST_CELL) if rows else "nothing differs")
    if len(found.rows) > _MOST_ROWS:
        lines.append(f"{len(found.rows) - _MOST_ROWS} more: --json")
    if found.base:
        lines += ["", "the base of B, seen from that of A:", *(f"- {sentence}" for sentence in found.base)]
    return "\n".join([*lines, "", "equal: " + ", ".join(f"{count} in {name}" for name, count in found.equal.items())])


def _record(version: Version, notes: list[str]) -> BaseRecord | None:
    try:
        return record_of(version)
    except RegistryError as error:
        notes.append(f"the base record of {version.reference}: {error.fact}")
        return None


def _sides(row: Row) -> tuple[str, str]:
    """Both values, long ones cut to where they begin to differ."""
    left, right = _value(row.left), _value(row.right)
    first = next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), 0)
    start = max(0, first - _BEFORE) if max(len(left), len(right)) > _WIDEST_CELL else 0
    cut = "…" if start else ""
    return cut + left[start:], cut + right[start:]


def _value(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    if isinstance(value, bool | list) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return render.number(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items())
    return str(value)
