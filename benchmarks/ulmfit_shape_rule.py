"""The rule of docs/decisions/0018 as code: differences between arms, their intervals, and verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Verdict = Literal["confirmed", "refuted", "inconclusive"]
Kind = Literal["more than", "less than", "within"]
RESAMPLES = 10_000
_BLOCK = 500
EVERY = "every other arm"


@dataclass(frozen=True)
class Difference:
    """An error in points, or the difference of two, over data sets, seeds and test rows."""

    point: float
    low: float
    high: float
    error: float
    """Standard error over the seeds; nan for one seed."""


@dataclass(frozen=True)
class Claim:
    """One line of the table of claims."""

    name: str
    text: str
    arm: str
    rival: str
    """The arm that it is compared with, or EVERY."""
    kind: Kind
    margins: Mapping[int, float]
    """Number of training rows → margin in points; each has its own verdict."""
    minus: int | None = None
    """Take off the difference at so many training rows."""


EQUAL = {100: 3.0, 1000: 1.5, 4000: 1.0}
CLAIMS = (
    Claim("1", "from scratch is far worse than any other arm", "scratch", EVERY, "more than", {100: 5.0, 1000: 5.0}),
    Claim("2a", "the head alone underfits", "head_only", "full", "more than", {1000: 1.0, 4000: 1.0}),
    Claim("2b", "and the more, the more rows there are", "head_only", "full", "more than", {4000: 0.0}, minus=100),
    Claim("3", "gradual unfreezing alone changes nothing", "gradual_top_down", "full", "within", {100: 3.0, 1000: 1.5}),
    Claim(
        "4a",
        "ULMFiT (all three together) is better than full",
        "gradual_discr_stlr",
        "full",
        "less than",
        dict.fromkeys(EQUAL, 0.0),
    ),
    Claim("4b", "or at least not worse", "gradual_discr_stlr", "full", "less than", EQUAL),
    Claim("5a", "BitFit is as good as full", "bias_only", "full", "within", {100: 3.0, 1000: 1.5}),
    Claim("5b", "LoRA is as good as full", "lora", "full", "within", EQUAL),
    Claim("6", "layer-wise decay of 0.95 changes nothing", "full_decay", "full", "within", {100: 3.0, 1000: 1.5}),
)


def difference(parts: Sequence[Numbers], *, resamples: int = RESAMPLES) -> Difference:
    """The mean over data sets of numbers (seeds × test rows), in points, with the interval of resampled seeds and rows.

    Each data set draws its seeds and its rows by itself; a draw takes every drawn seed at every drawn row.
    """
    random = np.random.default_rng(0)
    total = np.zeros(resamples)
    for part in parts:
        seeds, rows = part.shape
        for start in range(0, resamples, _BLOCK):
            count = min(_BLOCK, resamples - start)
            of_seeds = _drawn(random, count, seeds)
            of_rows = _drawn(random, count, rows)
            total[start : start + count] += ((of_rows @ part.T) * of_seeds).sum(axis=1)
    by_seed = 100 * np.mean([part.mean(axis=1) for part in parts], axis=0)
    low, high = np.quantile(100 * total / len(parts), [0.025, 0.975])
    error = float(by_seed.std(ddof=1) / math.sqrt(by_seed.size)) if by_seed.size > 1 else math.nan
    return Difference(float(by_seed.mean()), float(low), float(high), error)


def _drawn(random: np.random.Generator, count: int, size: int) -> Numbers:
    """The share that each of `size` things has in each of `count` draws of as many with replacement."""
    chosen = random.integers(0, size, size=(count, size)) + size * np.arange(count)[:, None]
    return np.bincount(chosen.ravel(), minlength=count * size).reshape(count, size) / size


def judge(kind: Kind, margin: float, found: Difference) -> Verdict:
    """The verdict on one difference."""
    if kind == "within":
        if -margin < found.low and found.high < margin:
            return "confirmed"
        return "refuted" if found.low > margin or found.high < -margin else "inconclusive"
    if kind == "less than":  # the mirror of "more than"
        found, margin = Difference(-found.point, -found.high, -found.low, found.error), -margin
    if found.low > margin and found.point - margin > 2 * found.error:
        return "confirmed"
    return "refuted" if found.high < margin else "inconclusive"


@dataclass(frozen=True)
class Judged:
    """A claim at one number of rows."""

    verdict: Verdict
    found: dict[str, Difference] = field(default_factory=dict)
    """The difference from each rival, over all data sets."""


Errors = Callable[[str, str, int], Numbers]
"""Data set, arm, number of training rows → 0 or 1 for right or wrong, of shape (seeds, test rows)."""


def verdict(claim: Claim, n: int, errors: Errors, sets: Sequence[str], arms: Sequence[str]) -> Judged:
    """What the rule says of a claim: of every rival, over the data sets together and alone."""
    rivals = [arm for arm in arms if arm != claim.arm] if claim.rival == EVERY else [claim.rival]
    found: dict[str, Difference] = {}
    verdicts: list[Verdict] = []
    for rival in rivals:
        parts = [_part(claim, rival, n, errors, name) for name in sets]
        found[rival] = difference(parts)
        own = judge(claim.kind, claim.margins[n], found[rival])
        alone = [judge(claim.kind, claim.margins[n], difference([part])) for part in parts]
        verdicts.append("inconclusive" if own == "confirmed" and "refuted" in alone else own)
    if "refuted" in verdicts:
        return Judged("refuted", found)
    return Judged("confirmed" if set(verdicts) == {"confirmed"} else "inconclusive", found)


def _part(claim: Claim, rival: str, n: int, errors: Errors, name: str) -> Numbers:
    part = errors(name, claim.arm, n) - errors(name, rival, n)
    if claim.minus is not None:
        part = part - (errors(name, claim.arm, claim.minus) - errors(name, rival, claim.minus))
    return part


def record(found: Difference) -> dict[str, float | None]:
    """A difference for JSON, in points."""
    values = {"point": found.point, "low": found.low, "high": found.high, "se_over_seeds": found.error}
    return {name: round(value, 2) if math.isfinite(value) else None for name, value in values.items()}


def lines(errors: Errors, sets: Sequence[str], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Every claim at each of its numbers of rows."""
    made = []
    for claim in CLAIMS:
        for n, margin in claim.margins.items():
            judged = verdict(claim, n, errors, sets, arms)
            against = {rival: record(one) for rival, one in judged.found.items()}
            asked = {"claim": claim.name, "text": claim.text, "n": n, "kind": claim.kind, "margin": margin}
            made.append({**asked, "difference": against, "verdict": judged.verdict})
    return made
