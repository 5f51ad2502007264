"""Looks at the figures of every step and says when a run goes wrong: stated rules, each with its threshold and reason.

Plain arithmetic over plain numbers: no torch, no clock, no randomness, so that the same figures give the same alarms,
also when the run was interrupted in between (`state`, `restore`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Self

from peftkit.render import number
from peftkit.training.watchdog_rules import (
    BLOCKS,
    EARLY,
    FIRST,
    MAD_TO_SIGMA,
    NATS,
    QUIET,
    RULES,
    WINDOW,
    WORSE,
    Alarm,
    Rule,
)

__all__ = ["RULES", "Alarm", "Rule", "Watchdog"]

_RULES = {rule.id: rule for rule in RULES}

_FEWER_EPOCHS = f"train fewer epochs: train.num_train_epochs=…, or set train.early_stopping_patience={WORSE}"

Finding = tuple[str, str, str] | None
"""Fact, what was expected, the edit that mends it."""


@dataclass
class _Seen:
    first: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    """Highest peak of each finished block, and of the one in progress."""
    speeds: list[float] = field(default_factory=list)
    spiking: int = 0
    exploded: list[int] = field(default_factory=list)
    zeros: int = 0
    steps: int = 0
    top_rate: float = 0.0
    best: list[float] = field(default_factory=list)
    """Step and NLL of the best measurement."""
    worse: int = 0
    told: dict[str, int] = field(default_factory=dict)
    """Step at which each rule last spoke."""


class Watchdog:
    """Watches one run of `total_steps`, whose settings ask for the peak rate `learning_rate`.

    Single groups of parameters may train at other rates; what is advised is said of the setting.
    """

    def __init__(self, total_steps: int, *, learning_rate: float, warmup_steps: int = 0) -> None:
        self.total_steps = total_steps
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self._seen = _Seen()

    def state(self) -> dict[str, Any]:
        """What was seen so far as JSON values; a watchdog that restores it goes on the same."""
        return asdict(self._seen)

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go on from the `state` of another; an empty one is the beginning."""
        self._seen = _Seen(**{name: _copy(value) for name, value in state.items()})
        return self

    def begin_anew(self) -> None:
        """Forget what gradients, memory and speed were: layers join or leave, and all three change with them.

        The loss goes on from where it is, so its rules keep what they saw.
        """
        for window in (self._seen.norms, self._seen.exploded, self._seen.peaks, self._seen.speeds):
            window.clear()

    def observe(self, step: int, figures: Mapping[str, float]) -> list[Alarm]:
        """Take the figures of one step, or of one measurement (`held_out_nll`); the alarms, stops first."""
        found = [("evaluation-worse", self._evaluation(step, figures))] if "held_out_nll" in figures else []
        if "held_out_nll" not in figures:
            self._seen.steps += 1
            found += self._finite(figures)
            if not found:
                found = [(name, check(self, step, figures)) for name, check in _CHECKS]
        alarms = [
            self._alarm(name, step, *finding) for name, finding in found if finding and self._may_tell(name, step)
        ]
        return sorted(alarms, key=lambda alarm: alarm.action != "stop")

    def _may_tell(self, name: str, step: int) -> bool:
        if name in self._seen.told and step - self._seen.told[name] < QUIET and name != "evaluation-worse":
            return False
        self._seen.told[name] = step
        return True

    def _alarm(self, name: str, step: int, fact: str, expected: str, hint: str) -> Alarm:
        return Alarm(name, _RULES[name].action, step, fact, expected, hint)

    def _finite(self, figures: Mapping[str, float]) -> list[tuple[str, Finding]]:
        found: list[tuple[str, Finding]] = []
        for key, name, what in (("loss", "loss-not-finite", "the loss"),
                                ("grad_norm", "gradient-not-finite", "the gradient norm")):  # fmt: skip
            value = figures.get(key, 0.0)
            if not math.isfinite(value):
                found.append((name, (f"{what} is {value}", "a finite number", self._lower())))
        return found

    def _evaluation(self, step: int, figures: Mapping[str, float]) -> Finding:
        seen, nll = self._seen, figures["held_out_nll"]
        if math.isfinite(nll) and (not seen.best or nll < seen.best[1]):
            seen.best, seen.worse = [step, nll], 0
            return None
        seen.worse += 1
        if seen.worse != WORSE:  # said once per best
            return None
        best = f"{number(seen.best[1])} after step {int(seen.best[0])}" if seen.best else "none"
        fact = f"the held-out NLL was above its best in {seen.worse} measurements in a row, now {number(nll)}"
        return (
            fact,
            f"below the best, {best}",
            _FEWER_EPOCHS,
        )

    def _zero(self, step: int, figures: Mapping[str, float]) -> Finding:
        if "grad_norm" not in figures:
            return None
        self._seen.zeros = self._seen.zeros + 1 if figures["grad_norm"] == 0 else 0
        if self._seen.zeros < 3:
            return None
        hint = "look at adapter.target_modules: the layers must be part of what computes the answer"
        return f"the gradient norm was 0 in {self._seen.zeros} steps in a row", "a gradient above 0", hint

    def _loss(self, step: int, figures: Mapping[str, float]) -> Finding:
        """The spike rule; it also keeps the losses that divergence and the rules of the rate read after it."""
        if "loss" not in figures:
            return None
        seen, loss, found = self._seen, figures["loss"], None
        seen.top_rate = max(seen.top_rate, figures.get("learning_rate", 0.0))
        if len(seen.losses) >= EARLY:
            usual = median(seen.losses)
            limit = usual + max(8 * _deviation(seen.losses), NATS)
            seen.spiking = seen.spiking + 1 if loss > limit else 0
            if seen.spiking == 3:
                fact = f"the loss is {number(loss)}, the third in a row over {number(limit)}"
                found = (fact, f"about {number(usual)}, the median of the last {len(seen.losses)}",
                         f"{self._lower()}, or look at the rows of these steps")  # fmt: skip
        if len(seen.first) < FIRST:
            seen.first.append(loss)
        _push(seen.losses, loss)
        return found

    def _divergence(self, step: int, figures: Mapping[str, float]) -> Finding:
        seen = self._seen
        if "loss" not in figures or len(seen.losses) < 30 or seen.steps < 30 + FIRST:
            return None
        now, start = median(seen.losses[-30:]), max(seen.first)
        if now <= start + NATS:
            return None
        fact = f"the median loss of the last 30 steps is {number(now)}"
        return fact, f"below {number(start)}, the highest of the first {FIRST} steps", self._lower()

    def _too_high(self, step: int, figures: Mapping[str, float]) -> Finding:
        seen = self._seen
        since = seen.steps - self.warmup_steps
        if "loss" not in figures or not FIRST <= since <= EARLY or len(seen.losses) < 2 * FIRST:
            return None
        now, start = median(seen.losses[-FIRST:]), median(seen.first)
        if now <= start + max(NATS, 4 * self._noise()):
            return None
        fact = f"the loss rose from {number(start)} to {number(now)} at a rate of {number(seen.top_rate)}"
        return fact, f"a falling loss in the first {EARLY} steps after warm-up", self._lower()

    def _too_low(self, step: int, figures: Mapping[str, float]) -> Finding:
        seen = self._seen
        if "learning_rate" not in figures or seen.steps - self.warmup_steps != EARLY or seen.top_rate > 2e-6:
            return None
        start, now = median(seen.first), median(seen.losses[-FIRST:])
        if abs(start - now) >= max(self._noise(), 1e-3):
            return None
        fact = f"the loss stayed at {number(now)} (first {number(start)}) at a rate of {number(seen.top_rate)}"
        return fact, f"a loss that moves more than its noise, {number(self._noise())}", _rate(10 * self.learning_rate)

    def _lower(self) -> str:
        return _rate(self.learning_rate / 5)

    def _noise(self) -> float:
        """Robust deviation of a single loss, from neighbouring steps, so that a trend does not count as noise."""
        losses = self._seen.losses[-EARLY:]
        return _deviation([b - a for a, b in itertools.pairwise(losses)]) / math.sqrt(2)

    def _explosion(self, step: int, figures: Mapping[str, float]) -> Finding:
        seen, norm = self._seen, figures.get("grad_norm")
        if norm is None:
            return None
        usual = median(seen.norms) if len(seen.norms) >= EARLY else None
        _push(seen.norms, norm)
        if not usual or norm <= 10 * usual:
            return None
        seen.exploded = [at for at in seen.exploded if step - at < 20] + [step]
        if len(seen.exploded) < 3:
            return None
        fact = f"the gradient norm is {number(norm)}, the third in 20 steps over {number(10 * usual)}"
        return fact, f"about {number(usual)}, the median before", f"{self._lower()}, or train.max_grad_norm=0.3"

    def _memory(self, step: int, figures: Mapping[str, float]) -> Finding:
        if (peak := figures.get("peak_gb")) is None or not math.isfinite(peak):
            return None
        peaks = self._seen.peaks
        if (self._seen.steps - 1) % WINDOW == 0 or not peaks:
            peaks.append(peak)
        peaks[-1] = max(peaks[-1], peak)
        del peaks[: -BLOCKS - 1]
        ends = self._seen.steps % WINDOW == 0
        if not ends or len(peaks) <= BLOCKS or any(b < 1.01 * a for a, b in itertools.pairwise(peaks)):
            return None
        fact = (
            f"the peak memory rose in each of {BLOCKS} blocks of {WINDOW} steps, {peaks[0]:.2f} to {peaks[-1]:.2f} GB"
        )
        return fact, "a peak that settles", "lower data.max_length, or resume now and then: peftkit train --resume RUN"

    def _throughput(self, step: int, figures: Mapping[str, float]) -> Finding:
        if (speed := figures.get("tokens_per_s")) is None or not math.isfinite(speed):
            return None
        speeds = self._seen.speeds
        _push(speeds, speed, WINDOW + FIRST)
        if len(speeds) < EARLY + FIRST:
            return None
        now, before = median(speeds[-FIRST:]), median(speeds[:-FIRST])
        if now >= before / 3:
            return None
        hint = "look for swapping (free -h) and other processes (nvidia-smi, top); peftkit plan says what fits"
        return f"{number(now)} tokens/s in the last {FIRST} steps", f"about {number(before)}, as before", hint


_CHECKS: tuple[tuple[str, Callable[[Watchdog, int, Mapping[str, float]], Finding]], ...] = (
    ("loss-spike", Watchdog._loss),
    ("divergence", Watchdog._divergence),
    ("rate-too-high", Watchdog._too_high),
    ("rate-too-low", Watchdog._too_low),
    ("zero-gradient", Watchdog._zero),
    ("gradient-explosion", Watchdog._explosion),
    ("memory-creep", Watchdog._memory),
    ("throughput-collapse", Watchdog._throughput),
)


def _rate(value: float) -> str:
    return f"train.learning_rate={value:.1g}"


def _deviation(values: list[float]) -> float:
    """Robust standard deviation: 1.4826 times the median distance from the median."""
    if not values:
        return 0.0
    middle = median(values)
    return MAD_TO_SIGMA * median([abs(value - middle) for value in values])


def _push(values: list[float], value: float, longest: int = WINDOW) -> None:
    values.append(float(value))
    del values[:-longest]


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value
