"""The fastest settings of TRL for given rows: five of them are measured again by `train_throughput.py`, as arms.

Padded rows by 8, 4, 2 and 1 at once (8 rows to a step in all of them), grouped by length over the whole set or within
a step (`batch_rebalance`), laid flat (`padding_free`), packed (`bfd`), without checkpointing; then the fastest with it.
Grouping and packing change which rows share a step, so losses are compared over the epoch, each answer token counted
once. `chunked_nll` is not tried: TRL 1.16 makes it `nll` (sft_config.py), whose head never holds all logits; nor `dft`,
which is another loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CLOSE = 0.01
"""How far a loss may be from that of the plain padded rows."""
REFERENCE: dict[str, Any] = {"batch": 8, "checkpointing": False}
CANDIDATES: list[dict[str, Any]] = [
    REFERENCE,
    *({"batch": batch, "checkpointing": False} for batch in (4, 2, 1)),
    *({"batch": batch, "checkpointing": False, "order": "group_by_length"} for batch in (8, 4, 2)),
    *({"batch": batch, "checkpointing": False, "order": "batch_rebalance"} for batch in (4, 2)),
    *({"batch": batch, "checkpointing": False, "padding_free": True} for batch in (8, 4, 2)),
    *({"packs": packs, "checkpointing": False} for packs in (1, 2)),
]
FINALISTS = 5
"""Few rows do not decide: the five fastest of one search were within 8 % of one another."""
Run = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Measures a setting of TRL, or takes it from what was measured before."""


def name_of(training: dict[str, Any]) -> str:
    """A setting in words."""
    words = [f"{training['packs']} packs a step" if "packs" in training else f"batch {training.get('batch', 8)}"]
    words += ["padding-free"] if training.get("padding_free") else []
    words += [training["order"]] if "order" in training else []
    words += ["checkpointing"] if training.get("checkpointing", True) else []
    return ", ".join(words)


def search(run: Run, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Try the candidates, then the fastest with checkpointing; `tried` has every setting with its figures.

    `fastest` are the FINALISTS fastest of equal loss. Raises RuntimeError where no setting has it.
    """
    reference = run(name_of(REFERENCE), REFERENCE)
    if "refused" in reference:  # as with long rows: more than the memory
        reference = run(name_of({"batch": 1}), {"batch": 1, "checkpointing": False})
    tried = [judged(one, run(name_of(one), one), reference) for one in candidates]
    again = {**fastest(tried)[0], "checkpointing": True}
    tried.append(judged(again, run(name_of(again), again), reference))
    return {"fastest": fastest(tried), "tried": tried}


def judged(training: dict[str, Any], result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """One line of the search: `why_not` where the setting is refused or computes another loss."""
    line = {"name": name_of(training), "training": training}
    if "refused" in result:
        return {**line, "why_not": result["refused"]}
    line |= {"tokens_per_second": result["whole"]}
    line |= {figure: result[figure] for figure in ("loss", "peak_bytes", "rows", "longest")}
    off = result["loss"] / reference["loss"] - 1
    if abs(off) > CLOSE:
        line["why_not"] = f"its loss is {result['loss']}, {off:+.1%} from {reference['loss']} of the same rows padded"
    return line


def fastest(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings with the most tokens a second at equal loss, FINALISTS of them where there are so many."""
    left = [line for line in tried if "why_not" not in line]
    if not left:
        raise RuntimeError("no setting of TRL trains these rows: " + "; ".join(line["why_not"] for line in tried))
    left.sort(key=lambda line: -line["tokens_per_second"])
    return [line["training"] for line in left[:FINALISTS]]
