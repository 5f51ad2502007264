"""The rules of the watchdog as data: what each looks at, where it draws the line, why there, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["stop", "warn"]

WINDOW = 50  # steps that "lately" means
FIRST = 5  # steps that the beginning of a run is judged by
QUIET = 50  # steps for which a rule that warned keeps still
EARLY = 20  # steps after warm-up in which a wrong rate shows
NATS = 0.5  # a rise of the loss that matters: a perplexity 1.65 times as high
MAD_TO_SIGMA = 1.4826  # for a normal distribution
BLOCKS = 5  # blocks of WINDOW steps with a higher peak each


@dataclass(frozen=True)
class Rule:
    """A rule as the documentation prints it."""

    id: str
    action: Action
    threshold: str
    reason: str


WORSE = 3
"""Measurements in a row above the best one."""

RULES: tuple[Rule, ...] = (
    Rule("loss-not-finite", "stop", "NaN or infinite, once", "every later update would spread it"),
    Rule("gradient-not-finite", "stop", "norm NaN or infinite, once", "AdamW's moments keep it for good"),
    Rule("zero-gradient", "stop", "norm exactly 0 in 3 steps in a row",
         "nothing is learned: the adapter is frozen, detached, or its output multiplied by 0"),
    Rule("divergence", "warn", "median of the last 30 losses over the highest of the first 5 by 0.5 nats",
         "the model is worse than untrained, for longer than a spike lasts"),
    Rule("loss-spike", "warn", "3 losses in a row over the median of the last 50 by 8 robust deviations and 0.5 nats",
         "single hard batches pass in a step; a robust deviation (1.4826 MAD) is not raised by the spike itself"),
    Rule("gradient-explosion", "warn", "norm over 10 × the median of the last 50, 3 times in 20 steps",
         "clipping hides it in the loss, but every clipped step goes where one batch pushes it"),
    Rule("rate-too-high", "warn", "in the first 20 steps after warm-up the median of 5 losses is over that of the first"
         " 5 by 0.5 nats and 4 robust deviations", "a rate that fits lowers the loss there"),
    Rule("rate-too-low", "warn", "rate at most 2e-6 and a loss that moved less than its noise, 20 steps after warm-up",
         "LoRA is trained at 1e-4 to 2e-4 (QLoRA, arXiv 2305.14314, table 9); 100 times less moves nothing. Advised is "
         "ten times the run's own rate: some methods are trained at lower ones"),
    Rule("evaluation-worse", "warn", "3 measurements in a row above the best, where train.early_stopping_patience does "
         "not stop the run", "the adapter learns its training rows by heart"),
    Rule("memory-creep", "warn", "peak higher by 1 % or more in each of 5 blocks of 50 steps",
         "longer rows raise a peak ever more rarely (by chance in 1 of 720 runs); what rises steadily is kept alive"),
    Rule("throughput-collapse", "warn", "median tokens/s of 5 steps under 1/3 of that of the 50 before",
         "the host swaps, the card is throttled, or another process shares it"),
)  # fmt: skip


@dataclass(frozen=True)
class Alarm:
    """A rule that a step broke."""

    rule: str
    action: Action
    step: int
    fact: str
    expected: str
    hint: str

    @property
    def text(self) -> str:
        """Fact and expectation as one sentence, for a warning."""
        return f"step {self.step}: {self.fact} (expected: {self.expected}; rule {self.rule})"
