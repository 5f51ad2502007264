"""Trials that cost nothing: a bowl over the learning rate and the rank, in this process and in others that are killed.

made_trials.py FOLDER TRIALS SECONDS [KILL_AT]   one process of a sweep; it kills itself in trial KILL_AT
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from peftkit.events import Report, silent
from peftkit.recipe.sweeping.plan import load_plan, started
from peftkit.recipe.sweeping.search import work
from peftkit.recipe.sweeping.trial import Objective, Stop, Trial

SPACE = ["learning_rate=1e-5..1e-1", "r=4,8,16"]


def bowl(trial: Trial) -> float:
    """Lowest at a rate of 1e-3 and rank 8, where it is 0."""
    rate, rank = float(trial.settings.get("train.learning_rate", 1e-4)), int(trial.settings.get("adapter.r", 16))
    return (math.log10(rate) + 3) ** 2 + (math.log2(rank) - 3) ** 2


def go(trial: Trial, stop: Stop, report: Report) -> tuple[str | None, Objective]:
    """A trial without a run; it is measured on the way, far above its end at first."""
    seen: dict[int, float] = {}
    for step, factor in ((1, 4.0), (2, 2.0)):
        seen[step] = factor * bowl(trial)
        stop(step, seen[step], seen)
    return f"run-{trial.index}", Objective("bowl", bowl(trial), "min")


def made(folder: Path, *more: str, name: str = "made", **asked: Any) -> Path:
    """A sweep over the bowl that has not begun."""
    return started(folder, name, "lora_sft", [*SPACE, *more], **{"prune": False, **asked})


def main(folder: Path, trials: int, seconds: float, kill_at: int | None) -> None:
    def slow(trial: Trial, stop: Stop, report: Report) -> tuple[str | None, Objective]:
        found = go(trial, stop, report)
        time.sleep(seconds)
        if trial.index == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    work(folder, load_plan(folder), trials, slow, silent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
