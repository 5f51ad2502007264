"""Base and adapter side by side on preferences: intervals, the table that a user reads, the figures of a manifest.

| figure | of a pair, it is right when |
|---|---|
| `preference_accuracy` | log π(chosen) - log base(chosen) > the same of rejected: the implicit reward (after only) |
| `preference_accuracy_per_token` | the same, each log-ratio over its answer's tokens |
| `likelihood_accuracy` | the better answer is the likelier one |
| `likelihood_accuracy_per_token` | the same per token, which a preference for short answers does not raise |

Rewards and margins are log-ratios in nats, without β: TRL's are β times these. Labelled rows that are two answers of
one pair are measured as that pair. Of other labelled rows the accuracy is the share of (wanted, unwanted) couples in
which the wanted one has the higher reward, which is the area under the ROC curve; its interval resamples the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from peftkit.data.chat import Example
from peftkit.evaluation.compare import Interval, Numbers, mean, mean_nll, paired_mean, paired_nll, wilson
from peftkit.evaluation.retention import RetentionText

_RESAMPLES = 2_000


@dataclass(frozen=True)
class PreferenceMeasured:
    """One contestant's log-likelihoods in nats; lists follow the order of what is measured."""

    name: str
    better: Numbers
    """Of the better (wanted) answers."""
    worse: Numbers
    """Of the worse (unwanted) answers."""
    retention: list[float]
    """Summed NLL per passage; empty when retention is off."""


@dataclass(frozen=True)
class PreferenceComparison:
    """Base against adapter on the same held-out answers."""

    better: tuple[Example, ...]
    worse: tuple[Example, ...]
    paired: bool
    """Whether the n-th better and the n-th worse answer are of one pair."""
    text: RetentionText | None
    base: PreferenceMeasured
    adapter: PreferenceMeasured

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "", "prefers the better", "95 %", "per token", "likelier", "margin (nats)", "answer NLL", "general NLL"
    )  # fmt: skip

    @property
    def accuracy(self) -> Interval:
        """Share of pairs, or of (wanted, unwanted) couples, that the adapter's reward ranks right."""
        return self._ranked(*self._rewards())

    @property
    def margin(self) -> Interval:
        """Reward of the better answer minus that of the worse one in nats: mean of pairs, or difference of means."""
        better, worse = self._rewards()
        return mean(better - worse) if self.paired else _resampled(better, worse, lambda b, w: b.mean() - w.mean())

    @property
    def learned(self) -> Interval:
        """Change of the better answers' NLL per token, adapter minus base: preference training may raise it."""
        return paired_nll(-self.base.better, -self.adapter.better, _tokens(self.better))

    @property
    def forgotten(self) -> Interval | None:
        """Change of general-text NLL per token, adapter minus base; positive is worse."""
        if self.text is None:
            return None
        return paired_nll(self.base.retention, self.adapter.retention, self.text.tokens)

    def objective(self) -> tuple[str, float, str]:
        """What a search over settings goes by: name, value and direction."""
        return "preference_accuracy", self.accuracy.point, "max"

    def figures(self) -> dict[str, dict[str, Any]]:
        """Numbers for the manifest: before, after, other. No row, no text."""
        better, worse = self._rewards()
        after = {
            "preference_accuracy": _plain(self.accuracy),
            "preference_accuracy_per_token": _plain(self._ranked(*self._rewards(per_token=True))),
            "margin": _plain(self.margin),
            "reward_better": _plain(mean(better)),
            "reward_worse": _plain(mean(worse)),
        }
        other: dict[str, Any] = {
            "measured": {"pairs": len(better)} if self.paired else {"wanted": len(better), "unwanted": len(worse)},
            "answer_nll_change": _plain(self.learned),
        }
        if self.paired:
            other["likelihood_accuracy_change"] = _plain(self._likelier_change())
        if self.forgotten is not None:
            other["retention_nll_change"] = _plain(self.forgotten)
        return {"before": self._figures(self.base), "after": after | self._figures(self.adapter), "other": other}

    def rows(self) -> list[tuple[Any, ...]]:
        """The table that a user reads: one line per contestant."""
        return [self._line(self.base), self._line(self.adapter)]

    def samples(self) -> list[dict[str, Any]]:
        """Every held-out row's rewards in nats, for the run folder only."""
        better, worse = self._rewards()
        if self.paired:
            couples = zip(self.better, better.tolist(), worse.tolist(), strict=True)
            return [{"where": each.where, "chosen": b, "rejected": w, "margin": b - w} for each, b, w in couples]
        rows = [(each, value, True) for each, value in zip(self.better, better.tolist(), strict=True)]
        rows += [(each, value, False) for each, value in zip(self.worse, worse.tolist(), strict=True)]
        return [{"where": each.where, "reward": value, "desirable": wanted} for each, value, wanted in rows]

    def _rewards(self, *, per_token: bool = False) -> tuple[Numbers, Numbers]:
        better, worse = self.adapter.better - self.base.better, self.adapter.worse - self.base.worse
        return (better / _tokens(self.better), worse / _tokens(self.worse)) if per_token else (better, worse)

    def _ranked(self, better: Numbers, worse: Numbers) -> Interval:
        if self.paired:
            return wilson(int((better > worse).sum()), len(better))
        return _resampled(better, worse, _area)

    def _likelier_change(self) -> Interval:
        before, after = ((m.better > m.worse).astype(float) for m in (self.base, self.adapter))
        return paired_mean(before, after)

    def _figures(self, measured: PreferenceMeasured) -> dict[str, Any]:
        figures: dict[str, Any] = {"answer_nll": _plain(mean_nll(-measured.better, _tokens(self.better)))}
        if self.paired:
            figures["likelihood_accuracy"] = _plain(self._ranked(measured.better, measured.worse))
            per_token = measured.better / _tokens(self.better), measured.worse / _tokens(self.worse)
            figures["likelihood_accuracy_per_token"] = _plain(self._ranked(*per_token))
        if self.text is not None:
            figures["retention_nll"] = _plain(mean_nll(measured.retention, self.text.tokens))
        return figures

    def _line(self, measured: PreferenceMeasured) -> tuple[Any, ...]:
        adapted = measured is self.adapter
        bounds, per_token = self.accuracy, self._ranked(*self._rewards(per_token=True))
        likelier = self._ranked(measured.better, measured.worse).point if self.paired else None
        general = mean_nll(measured.retention, self.text.tokens) if self.text is not None else None
        return (
            measured.name,
            f"{bounds.point:.0%}" if adapted else "",
            f"{bounds.low:.0%}–{bounds.high:.0%}" if adapted else "",
            f"{per_token.point:.0%}" if adapted else "",
            f"{likelier:.0%}" if likelier is not None else "",
            f"{self.margin.point:+.2f}" if adapted else "",
            f"{mean_nll(-measured.better, _tokens(self.better)).point:.3f}",
            f"{general.point:.3f}" if general else "",
        )


def _tokens(answers: tuple[Example, ...]) -> Numbers:
    return np.array([answer.answer_tokens for answer in answers], dtype=np.float64)


def _area(better: Numbers, worse: Numbers) -> float:
    """Share of couples in which the better one is higher, ties counted half: the area under the ROC curve."""
    order = np.sort(worse)
    below, up_to = np.searchsorted(order, better, "left"), np.searchsorted(order, better, "right")
    return float((below + up_to).sum() / (2 * len(better) * len(worse)))


def _resampled(better: Numbers, worse: Numbers, of: Callable[[Numbers, Numbers], float]) -> Interval:
    """Percentile bootstrap of a figure of two independent groups of rows."""
    random, n = np.random.default_rng(0), len(better) + len(worse)
    point = float(of(better, worse))
    if min(len(better), len(worse)) < 2:
        return Interval(point, -math.inf, math.inf, n=n)
    drawn = [of(random.choice(better, len(better)), random.choice(worse, len(worse))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(point, float(low), float(high), n=n)


def _plain(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON; the infinite ends that a single row gives become null."""
    ends = (interval.point, interval.low, interval.high)
    return {name: end if math.isfinite(end) else None for name, end in zip(("point", "low", "high"), ends, strict=True)}
