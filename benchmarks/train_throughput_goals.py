"""What `train_throughput.py` set out to reach, and what it measured: every goal with its ratio, met or not."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

CLOSE = 0.01
"""Losses within this share of each other are equal."""
NAMES = {32: "float32", 4: "nf4"}
Runs = list[dict[str, Any]]


def cell_name(bits: int, rows: str) -> str:
    """How a cell of the matrix is called."""
    return f"{NAMES[bits]}, {rows}"


def summed(runs: Runs) -> dict[str, Any]:
    """An arm's figures over its rounds: the median of rates, the highest peak; `refused` where it never ran."""
    ran = [run for run in runs if "refused" not in run]
    if not ran:
        return {"refused": runs[0]["refused"]}
    return {
        "tokens_per_second": round(statistics.median(run["tokens_per_second"] for run in ran), 1),
        "whole": round(statistics.median(run["whole"] for run in ran), 1),
        "rounds": [run["tokens_per_second"] for run in ran],
        "loss": round(statistics.fmean(run["loss"] for run in ran), 5),
        "peak_bytes": max(run["peak_bytes"] for run in ran),
        "n": len(ran),
    }


def opponent(arms: dict[str, dict[str, Any]]) -> str | None:
    """The fastest arm of TRL, of those with peftkit's loss: who the speed is compared with."""
    equal = [arm for arm in _of_trl(arms) if _apart(arms["peftkit"], arms[arm]) <= CLOSE]
    return max(equal, key=lambda arm: float(arms[arm]["tokens_per_second"]), default=None)


def leanest(cell: dict[str, Any]) -> dict[str, Any] | None:
    """The lowest peak of TRL at equal loss, among the arms and what the cell's search tried.

    A search has fewer rows than the arms, so its longest row may be another one: both are told.
    """
    arms, rows = cell["arms"], {key: cell["rows"][key] for key in ("rows", "longest")}
    found = [
        {"name": arm, "peak_bytes": arms[arm]["peak_bytes"], "n": arms[arm]["n"], **rows, "from": "the arms"}
        for arm in _of_trl(arms)
        if _apart(arms["peftkit"], arms[arm]) <= CLOSE
    ]
    found += [
        {key: line[key] for key in ("name", "peak_bytes", "rows", "longest")}
        | {"n": 1, "from": "the search, where rows are fewer or as many: the longest may differ"}
        for line in cell["search"]["tried"]
        if "why_not" not in line
    ]
    return min(found, key=lambda one: float(one["peak_bytes"]), default=None)


def goals(cells: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of all cells that have the figures for them; an arm that was refused has none.

    `n` is how many runs there are on either side. Two cells are compared where they were measured on the same versions
    and hardware.
    """
    found: list[dict[str, Any]] = []
    for name, cell in cells.items():
        arms: dict[str, dict[str, Any]] = cell["arms"]
        ours, plain, tuned = (arms.get(arm, {}) for arm in ("peftkit", "trl defaults", cell["opponent"]))
        if name.endswith("mixed"):
            found += _ratio(name, "speed against TRL's defaults", ours, plain, "tokens_per_second", at_least=4.0)
            found += _ratio(name, "speed against tuned TRL", ours, tuned, "tokens_per_second", at_least=1.4)
        found += _ratio(name, "peak against TRL's defaults", ours, plain, "peak_bytes", at_most=0.25)
        found += _against_leanest(name, cell)
        for other, figures in (("TRL's defaults", plain), ("tuned TRL", tuned)):
            found += _equal(name, f"loss against {other}", ours, figures)
        if name.startswith("float32"):
            found += _ratio(name, "share of the ceiling", ours, cell.get("ceiling", {}), "tokens_per_second", 0.6)
        else:
            dense = cells.get(name.replace("nf4", "float32"), {})
            if dense.get("environment") == cell["environment"]:
                other = dense["arms"]["peftkit"]
                found += _ratio(name, "speed against float32", ours, other, "tokens_per_second", at_least=0.8)
    return found


def linear(lines: Runs) -> list[dict[str, Any]]:
    """Seconds per token of each size, the first step included, and as a multiple of that of the size before it."""
    each = [{"tokens": line["trained_tokens"], "seconds_per_token": _per_token(line)} for line in lines]
    for before, line in pairwise(each):
        line["against_the_size_before"] = round(line["seconds_per_token"] / before["seconds_per_token"], 3)
    return each


def ablation_shares(cell: dict[str, Any]) -> dict[str, Any]:
    """For every ablation: the time per token that its shortcut saves, as a share of all that is saved against TRL."""
    arms: dict[str, dict[str, Any]] = cell["arms"]
    time = {name: 1 / arm["tokens_per_second"] for name, arm in arms.items() if "tokens_per_second" in arm}
    return {
        arm.removeprefix("without "): {
            f"of the gain on {other}": round((time[arm] - time["peftkit"]) / (time[other] - time["peftkit"]), 3)
            for other in dict.fromkeys(("trl defaults", cell["opponent"]))
            if other in time
        }
        for arm in time
        if arm.startswith("without ") and "peftkit" in time
    }


def _of_trl(arms: dict[str, dict[str, Any]]) -> list[str]:
    return [arm for arm, figures in arms.items() if arm.startswith("trl") and "refused" not in figures]


def _apart(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """How far two losses are from each other, as a share."""
    return float(round(abs(ours["loss"] / other["loss"] - 1), 5))


def _against_leanest(name: str, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The peak against TRL's lowest: no goal, a figure beside it."""
    ours, other = cell["arms"]["peftkit"], leanest(cell)
    if other is None or "peak_bytes" not in ours:
        return []
    measured = round(ours["peak_bytes"] / other["peak_bytes"], 3)
    line = {"cell": name, "beside": "peak against the leanest TRL", "measured": measured, "n": [ours["n"], other["n"]]}
    return [{**line, "longest": cell["rows"]["longest"], "leanest": other}]


def _per_token(line: dict[str, Any]) -> float:
    return float(round(sum(line["seconds"]) / line["trained_tokens"], 6))


def _ratio(
    cell: str,
    goal: str,
    ours: dict[str, Any],
    other: dict[str, Any],
    figure: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> list[dict[str, Any]]:
    if figure not in ours or figure not in other:
        return []
    measured = round(ours[figure] / other[figure], 3)
    line = {"cell": cell, "goal": goal, "measured": measured, "n": [ours["n"], other["n"]]}
    if at_least is not None:
        return [{**line, "at_least": at_least, "met": measured >= at_least}]
    assert at_most is not None
    return [{**line, "at_most": at_most, "met": measured <= at_most}]


def _equal(cell: str, goal: str, ours: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    if "loss" not in ours or "loss" not in other:
        return []
    apart, n = _apart(ours, other), [ours["n"], other["n"]]
    return [{"cell": cell, "goal": goal, "measured": apart, "n": n, "at_most": CLOSE, "met": apart <= CLOSE}]
