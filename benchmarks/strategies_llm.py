"""Compare strategies of fine-tuning on the embedded base in 4 bits: quality, forgetting, time, memory.

    PEFTKIT_TEST_DATA=/path/to/data nice python benchmarks/strategies_llm.py --minutes 90

Every arm sees equal rows in equal order for equal steps. Its rate is the best of three on the validation rows (seed 0;
one or two more are tried where the best is at an edge), then three seeds are trained at that rate, each with its own
initial numbers and order of rows, which all arms share. The test rows decide nothing. Reported of them: the mean answer
NLL over the seeds with a paired bootstrap interval over rows, against the base and against LoRA.

An effect against LoRA counts when the interval excludes 0, the mean over seeds is more than two standard errors of its
paired differences, and more than twice LoRA's own spread between seeds; all else is `not resolved`. `detectable` is the
smallest difference that these rows would show four times out of five (2.8 standard errors).

Each finished run is a line in the results file (.jsonl): after Ctrl-C or the minutes, start it again and it goes on.
Seconds per epoch come from one more run of each arm at the end, during which nothing else should run on the machine;
`--untimed` stops before these. The summary (.json, with versions and hardware) is written when all runs are there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fine_tune import counted, measure, rows_setting
from lab import ONE_RATE, Failed, Lab, OutOfTime, Result, best_rate, write

from peftkit.evaluation.compare import Interval, mean_nll, paired_nll
from peftkit.tuning.methods import AdapterSpec

RESULTS = Path(__file__).with_name("results") / "strategies_llm.jsonl"
ROWS = {"longest": 96, "test": 110, "validation": 40, "training": 72}
TRAIN = {"num_train_epochs": 2, "per_device_train_batch_size": 4}
"""36 steps of 4 rows."""
SMOKE = {"longest": 512, "test": 6, "validation": 4, "training": 8}
SEEDS = (0, 1, 2)
BEYOND = 2
MEASURED = ("validation", "test", "retention")
LORA = {"method": "lora"}
TOP = {"method": "top_layers", "top_layers": 7, "train_head": False}
ULMFIT = {"lr_scheduler_type": "slanted_triangular", "layerwise": {"decay": 0.95}}
PACE = {"every_steps": 3, "groups": 5}
"""Six parts of five blocks; the last one begins after 15 of 36 steps."""


@dataclass(frozen=True)
class Arm:
    """One strategy: what is trained, how, and where the search for its rate begins."""

    adapter: Mapping[str, Any]
    rate: float | str
    """The middle one of the three rates, or the arm whose rate this one takes."""
    train: Mapping[str, Any] = field(default_factory=dict)


ARMS = {
    "lora": Arm(LORA, 1e-3),
    "top_7": Arm(TOP, 1e-4),
    "top_7_cached_trunk": Arm(TOP, "top_7", {"trunk_cache": True}),
    "lora_decay_0.95": Arm(LORA, 1e-3, {"layerwise": {"decay": 0.95}}),
    "gradual_deep_first": Arm(LORA, 1e-3, {**ULMFIT, "unfreeze": {"direction": "deep_first", **PACE}}),
    "gradual_shallow_first": Arm(LORA, 1e-3, {**ULMFIT, "unfreeze": {"direction": "shallow_first", **PACE}}),
    "norms": Arm({"method": "norms"}, 3e-3),
}
"""The factor 0.95 is that of Zhang et al. (2006.05987)."""
UNTRAINED: dict[str, dict[str, Any] | None] = {"base": None, "base, top 7 unquantized": TOP}
"""The second one tells what the top arms owe to their layers' not being quantized."""


class Strategies:
    """The runs of all arms, from the file or made now."""

    def __init__(self, lab: Lab, smoke: str | None) -> None:
        self.lab, self.base = lab, smoke or "embedded:smollm2-135m"
        self.rows = rows_setting(**(SMOKE if smoke else ROWS))
        self.seed_numbers = SEEDS[:1] if smoke else SEEDS
        self.beyond = ONE_RATE if smoke else BEYOND
        self.rates: dict[str, float] = {}
        self.tried: dict[str, dict[float, float]] = {}
        self.at_edge: dict[str, bool] = {}

    def setting(self, adapter: Mapping[str, Any] | None, train: Mapping[str, Any] | None) -> dict[str, Any]:
        whole = AdapterSpec.model_validate(adapter).record() if adapter else None
        fixed = {"base": self.base, "bits": 4, "rows": self.rows, "measured": list(MEASURED)}
        return {**fixed, "adapter": whole, "train": dict(train) if train else None}

    def trained(self, name: str, rate: float, seed: int) -> Result:
        arm = ARMS[name]
        train = {**TRAIN, **arm.train, "learning_rate": rate, "seed": seed}
        return self.lab.run(f"{name}, rate {rate:g}, seed {seed}", self.setting({**arm.adapter, "seed": seed}, train))

    def untrained(self, name: str) -> Result:
        return self.lab.run(name, self.setting(UNTRAINED[name], None))

    def counts(self) -> dict[str, Any]:
        """Tokens of every row."""
        setting = {"base": self.base, "rows": self.rows, "counted": True}
        return self.lab.run("rows", setting)

    def rate(self, name: str) -> float:
        """The rate of an arm: searched on the validation rows, or another arm's."""
        start = ARMS[name].rate
        if isinstance(start, str):
            return self.rate(start)
        if name not in self.rates:
            tokens = sum(self.counts()["validation"])

            def score(rate: float) -> float:
                found = self.trained(name, rate, self.seed_numbers[0])
                return math.inf if "diverged" in found else sum(found["validation"]) / tokens

            self.rates[name], self.tried[name], self.at_edge[name] = best_rate(start, score, beyond=self.beyond)
        return self.rates[name]

    def timed(self, name: str) -> Result:
        """A run of seed 0 that measures nothing but time."""
        arm = ARMS[name]
        train = {**TRAIN, **arm.train, "learning_rate": self.rate(name), "seed": self.seed_numbers[0]}
        setting = self.setting({**arm.adapter, "seed": self.seed_numbers[0]}, train)
        return self.lab.run(f"{name}, timed", {**setting, "measured": [], "timed": True})

    def seeds(self, name: str) -> list[Result]:
        """The runs of an arm at its rate, one for each seed; those that training stopped are left out."""
        runs = [self.trained(name, self.rate(name), seed) for seed in self.seed_numbers]
        return [run for run in runs if "diverged" not in run]


def work(setting: dict[str, Any]) -> Result:
    """What one process does: count the tokens of the rows, or train and measure."""
    return counted(setting) if setting.get("counted") else measure(setting)


def summary(strategies: Strategies) -> dict[str, Any]:
    """All arms, each with its figures."""
    counts, base = strategies.counts(), strategies.untrained("base")
    lora = strategies.seeds("lora")
    return {
        "base": strategies.base,
        "bits": 4,
        "rows": {**strategies.rows, "answer_tokens": sum(counts["test"]), "retention_tokens": sum(counts["retention"])},
        "epoch": {"tokens": counts["epoch_tokens"], "answer_tokens": counts["epoch_answer_tokens"]},
        "train": dict(TRAIN),
        "seeds": list(strategies.seed_numbers),
        "untrained": {name: _measured([strategies.untrained(name)], base, counts) for name in UNTRAINED},
        "arms": {name: _arm(strategies, name, base, lora, counts) for name in ARMS},
    }


def _arm(strategies: Strategies, name: str, base: Result, lora: list[Result], counts: Result) -> dict[str, Any]:
    arm, runs = ARMS[name], strategies.seeds(name)
    found: dict[str, Any] = {"adapter": dict(arm.adapter), "train": dict(arm.train)}
    found |= {"learning_rate": strategies.rate(name), "diverged_seeds": len(strategies.seed_numbers) - len(runs)}
    if name in strategies.tried:
        scores = {f"{rate:g}": _finite(score) for rate, score in strategies.tried[name].items()}
        found |= {"validation_nll": scores, "rate_at_edge": strategies.at_edge[name]}
    if not runs:
        return found
    found |= _measured(runs, base, counts)
    found["trained_share"] = runs[0]["trained_share"]
    found["bytes"] = runs[0]["bytes"]
    found["peak_bytes"] = [run["peak_bytes"] for run in runs]
    found["epoch_seconds"] = strategies.timed(name)["epoch_seconds"]
    if isinstance(arm.rate, str):
        same = strategies.seeds(arm.rate)
        pairs = [
            pair for one, other in zip(runs, same, strict=True) for pair in zip(one["test"], other["test"], strict=True)
        ]
        found["largest_row_difference"] = max(abs(one - other) for one, other in pairs)
    if name != "lora" and len(runs) == len(lora):
        found["against_lora"] = _against(lora, runs, counts["test"])
    return found


def _measured(runs: Sequence[Result], base: Result, counts: Result) -> dict[str, Any]:
    """Answer NLL and retention, the mean over seeds, and their changes against the base."""
    test, kept = _mean(runs, "test"), _mean(runs, "retention")
    return {
        "answer_nll": _plain(mean_nll(test, counts["test"])),
        "by_seed": [round(sum(run["test"]) / sum(counts["test"]), 4) for run in runs],
        "against_base": _interval(paired_nll(base["test"], test, counts["test"])),
        "retention_nll": _plain(mean_nll(kept, counts["retention"])),
        "retention_change": _interval(paired_nll(base["retention"], kept, counts["retention"])),
        "loaded_peak_bytes": [run["loaded_peak_bytes"] for run in runs],
    }


def _against(lora: Sequence[Result], runs: Sequence[Result], tokens: Sequence[int]) -> dict[str, Any]:
    """The change against LoRA, with the verdict by the rule of this file's docstring."""
    change = paired_nll(_mean(lora, "test"), _mean(runs, "test"), tokens)
    own = [sum(run["test"]) / sum(tokens) for run in lora]
    pairs = [sum(run["test"]) / sum(tokens) - before for run, before in zip(runs, own, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
    noise = statistics.stdev(own) if len(own) > 1 else math.inf
    counts = change.excludes() and abs(change.point) > 2 * error and abs(change.point) > 2 * noise
    verdict = ("better" if change.point < 0 else "worse") if counts else "not resolved"
    figures = {"by_seed": [round(pair, 4) for pair in pairs], "lora_spread_between_seeds": _finite(noise)}
    return {"change": _interval(change), **figures, "verdict": verdict}


def _mean(runs: Sequence[Result], part: str) -> list[float]:
    means: list[float] = np.mean([run[part] for run in runs], axis=0).tolist()
    return means


def _plain(found: Interval) -> dict[str, float]:
    return {"point": round(found.point, 4), "low": round(found.low, 4), "high": round(found.high, 4), "n": found.n}


def _interval(change: Interval) -> dict[str, float]:
    """A change, and the smallest one that would be seen."""
    return {**_plain(change), "detectable": round(2.8 * (change.high - change.low) / (2 * 1.96), 4)}


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def run_all(strategies: Strategies, *, timed: bool) -> bool:
    """Make every run that is missing; False where some are left. A failed arm does not keep the others from theirs."""
    strategies.counts()
    works = [(strategies.untrained, name) for name in UNTRAINED] + [(strategies.seeds, name) for name in ARMS]
    for make, name in works + [(strategies.timed, name) for name in ARMS if timed]:
        try:
            make(name)
        except Failed:
            continue
        except OutOfTime as next_one:
            print(f"the minutes are over before {next_one}; start again to go on", file=sys.stderr)
            return False
    return timed and not strategies.lab.failures


def main() -> int:
    """Run what is missing, and write the summary when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines of the runs; the summary stands beside it")
    parser.add_argument("--minutes", type=float, default=90, help="begin no run that would end later")
    parser.add_argument("--untimed", action="store_true", help="leave the runs that measure time for a quiet machine")
    parser.add_argument("--smoke", metavar="BASE", help=argparse.SUPPRESS)  # every arm once, 4 steps on a small base
    arguments = parser.parse_args()
    lab = Lab(arguments.results, work, arguments.minutes)
    strategies = Strategies(lab, arguments.smoke)
    if not run_all(strategies, timed=not arguments.untimed):
        for failure in lab.failures:
            print(f"failed: {failure}", file=sys.stderr)
        return 1
    write(arguments.results.with_suffix(".json"), summary(strategies), [line["environment"] for line in lab.lines()])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to go on")
