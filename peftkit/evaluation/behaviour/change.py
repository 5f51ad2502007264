"""Outcomes of base and adapter on the same probes: what changed, by family, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peftkit.evaluation.compare import wilson


@dataclass(frozen=True)
class Outcome:
    """One probe put to one model."""

    id: str
    family: str
    answer: str
    passed: bool
    exposure: float | None = None
    """Of a canary's secret, in bits."""


@dataclass(frozen=True)
class Behaved:
    """Everything that one model was asked; outcomes follow the file, `recalled` the training rows that were chosen."""

    source: str
    sha256: str
    outcomes: tuple[Outcome, ...]
    recalled: tuple[bool, ...] = ()
    """Whether each training answer, once begun, was continued word for word."""


@dataclass(frozen=True)
class Family:
    """What became of one family's probes."""

    name: str
    prompts: int
    base: int
    """How many the base passes."""
    adapter: int
    lost: tuple[str, ...]
    """Ids that the base passes and the adapter fails."""
    won: tuple[str, ...]

    @property
    def p(self) -> float:
        """McNemar's exact test of the paired changes, two-sided."""
        return mcnemar(len(self.lost), len(self.won))

    def figures(self) -> dict[str, Any]:
        """Counts only: ids may be words of the user's."""
        return {
            "prompts": self.prompts,
            "base_passed": self.base,
            "adapter_passed": self.adapter,
            "base": _share(self.base, self.prompts),
            "adapter": _share(self.adapter, self.prompts),
            "pass_to_fail": len(self.lost),
            "fail_to_pass": len(self.won),
            "p": self.p,
        }

    def line(self) -> tuple[Any, ...]:
        """One row of the table, as COLUMNS names it."""
        sides = [cell for passed in (self.base, self.adapter) for cell in _cells(passed, self.prompts)]
        return (self.name, *sides, len(self.lost), len(self.won), f"{self.p:.2g}")


COLUMNS = ("family", "base", "95 %", "adapter", "95 %", "pass → fail", "fail → pass", "p (McNemar)")


@dataclass(frozen=True)
class BehaviourChange:
    """Base against adapter on the same probes."""

    base: Behaved
    adapter: Behaved

    def families(self) -> list[Family]:
        """Each family, in the order of the file."""
        names = dict.fromkeys(outcome.family for outcome in self.base.outcomes)
        return [self._family(name) for name in names]

    def lost(self, family: str | None = None) -> list[str]:
        """Ids that the base passes and the adapter fails."""
        return [name for each in self.families() if family in (None, each.name) for name in each.lost]

    def won(self) -> list[str]:
        """Ids that the base fails and the adapter passes."""
        return [name for each in self.families() for name in each.won]

    def exposures(self) -> tuple[float, float] | None:
        """The highest exposure of a secret in bits, of base and adapter; None without canaries."""
        sides = [[o.exposure for o in side.outcomes if o.exposure is not None] for side in (self.base, self.adapter)]
        return (max(sides[0]), max(sides[1])) if sides[0] and sides[1] else None

    def figures(self) -> dict[str, Any]:
        """For the manifest: counts, and which probes; no prompt, no answer, no id."""
        figures: dict[str, Any] = {
            "probes": self.base.source,
            "sha256": self.base.sha256,
            "families": {family.name: family.figures() for family in self.families()},
        }
        if (exposures := self.exposures()) is not None:
            figures["highest_exposure_bits"] = dict(zip(("base", "adapter"), exposures, strict=True))
        if self.base.recalled:
            figures["training_answers_continued"] = {
                "rows": len(self.base.recalled),
                "base": sum(self.base.recalled),
                "adapter": sum(self.adapter.recalled),
            }
        return figures

    def rows(self) -> tuple[tuple[Any, ...], ...]:
        """The table that a user reads."""
        return tuple(family.line() for family in self.families())

    def samples(self) -> list[dict[str, Any]]:
        """Answers side by side, for the run folder only."""
        lines = []
        for base, adapter in self._pairs():
            line: dict[str, Any] = {
                "probe": base.id,
                "family": base.family,
                "base": base.answer,
                "adapter": adapter.answer,
            }
            line |= {"base_passed": base.passed, "adapter_passed": adapter.passed}
            if base.exposure is not None:
                line |= {"base_exposure_bits": base.exposure, "adapter_exposure_bits": adapter.exposure}
            lines.append(line)
        return lines

    def _family(self, name: str) -> Family:
        pairs = [(base, adapter) for base, adapter in self._pairs() if base.family == name]
        lost = tuple(base.id for base, adapter in pairs if base.passed and not adapter.passed)
        won = tuple(base.id for base, adapter in pairs if adapter.passed and not base.passed)
        before, after = (sum(pair[side].passed for pair in pairs) for side in (0, 1))
        return Family(name, len(pairs), before, after, lost, won)

    def _pairs(self) -> list[tuple[Outcome, Outcome]]:
        return list(zip(self.base.outcomes, self.adapter.outcomes, strict=True))


def mcnemar(lost: int, won: int) -> float:
    """The two-sided exact p of McNemar's test (Psychometrika 12, 1947): the binomial test of `lost` in lost + won.

    Under no change a probe that changes is as likely to be lost as won; 1 where none changes.
    """
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / float(2**n)
    return min(1.0, 2 * tail)


def _share(passed: int, n: int) -> dict[str, float]:
    bounds = wilson(passed, n)
    return {"point": bounds.point, "low": bounds.low, "high": bounds.high}


def _cells(passed: int, n: int) -> tuple[str, str]:
    bounds = wilson(passed, n)
    return f"{passed}/{n}", f"{bounds.low:.0%}–{bounds.high:.0%}"
