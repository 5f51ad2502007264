"""Measure a learning rate for every method of METHODS, on the embedded base.

    PEFTKIT_TEST_DATA=/path/to/data nice python benchmarks/methods_sweep.py --minutes 90

Every method takes equal steps over equal rows in equal order (one seed), over the base in 4 bits where it trains there.
Three rates are tried, a factor of about 3 apart around the table's, and up to two more while the best is at an edge.
Runs this short on a base this small ask for higher rates than long ones on larger bases do; so the default is not the
rate with the lowest answer NLL on validation rows, but the lowest one that is not measurably worse (95 %, paired).

Each finished run is a line in the results file (.jsonl): after Ctrl-C or the minutes, start it again and it goes on.
The summary (.json, with versions and hardware) is written when all runs are there; tests/tuning/test_rates_measured.py
compares METHODS with it. With that table's rates the search begins where it ended, and makes no run again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from fine_tune import counted, measure, rows_setting
from lab import ONE_RATE, Failed, Lab, OutOfTime, Result, best_rate, write

from peftkit.evaluation.compare import mean_nll, paired_nll
from peftkit.tuning.methods import METHODS, AdapterSpec, MethodName

RESULTS = Path(__file__).with_name("results") / "methods_sweep.jsonl"
ROWS = {"longest": 96, "test": 0, "validation": 40, "training": 64}
TRAIN = {"num_train_epochs": 1, "per_device_train_batch_size": 4}
"""16 steps of 4 rows."""
SMOKE = {"longest": 512, "test": 0, "validation": 4, "training": 8}
BEYOND = 2
NEEDED: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"tokens": ["<|im_start|>", "<|im_end|>"]},
    "patterns": {"patterns": ["*.v_proj.weight"]},
}
"""What methods need that have no settings of their own to begin with."""
NOT_MEASURED = {"bias_only": "the embedded base has no biases, like all of Llama's kind; the rate is BitFit's"}


class Sweep:
    """The runs of all methods, from the file or made now."""

    def __init__(self, lab: Lab, smoke: str | None) -> None:
        self.lab, self.base = lab, smoke or "embedded:smollm2-135m"
        self.rows = rows_setting(**(SMOKE if smoke else ROWS))
        self.beyond = ONE_RATE if smoke else BEYOND

    def tokens(self) -> list[int]:
        """Answer tokens of every validation row."""
        found: list[int] = self.lab.run("rows", {"base": self.base, "rows": self.rows, "counted": True})["validation"]
        return found

    def run(self, method: MethodName, rate: float) -> Result:
        """One method at one rate."""
        adapter = AdapterSpec.model_validate({"method": method, **NEEDED.get(method, {})})
        setting = {
            "base": self.base,
            "bits": _bits(method),
            "rows": self.rows,
            "measured": ["validation"],
            "adapter": adapter.record(),
            "train": {**TRAIN, "learning_rate": rate},
        }
        return self.lab.run(f"{method}, rate {rate:g}", setting)

    def base_nll(self, bits: int) -> list[float]:
        """The untrained base's NLL of the validation rows."""
        fixed = {"base": self.base, "bits": bits, "rows": self.rows, "measured": ["validation"]}
        found: list[float] = self.lab.run(f"base, {bits} bits", {**fixed, "adapter": None, "train": None})["validation"]
        return found

    def best(self, method: MethodName) -> dict[str, Any]:
        """The best rate of a method, with the figures of every rate that was tried."""
        tokens = self.tokens()

        def score(rate: float) -> float:
            found = self.run(method, rate)
            return math.inf if "diverged" in found else sum(found["validation"]) / sum(tokens)

        rate, scores, edge = best_rate(METHODS[method].learning_rate, score, beyond=self.beyond)
        best, bits = self.run(method, rate), _bits(method)
        found: dict[str, Any] = {"learning_rate": self.gentlest(method, rate, scores), "best": rate, "at_edge": edge}
        found["bits"] = bits
        if bits != 4:
            found["why_not_4"] = METHODS[method].why_not
        found["settings"] = NEEDED.get(method, {})
        found["validation_nll"] = {f"{tried:g}": _finite(nll) for tried, nll in scores.items()}
        if "diverged" not in best:
            found["answer_nll"] = _interval(mean_nll(best["validation"], tokens))
            found["against_base"] = _interval(paired_nll(self.base_nll(bits), best["validation"], tokens))
            found |= {"trained_share": best["trained_share"], "seconds": sum(best["epoch_seconds"])}
        return found

    def gentlest(self, method: MethodName, best: float, scores: dict[float, float]) -> float:
        """The lowest rate whose NLL is not measurably above the best one's: the paired interval holds 0."""
        reference, tokens = self.run(method, best)["validation"], self.tokens()
        tied = [best]
        for rate in (rate for rate, nll in scores.items() if rate < best and math.isfinite(nll)):
            if paired_nll(reference, self.run(method, rate)["validation"], tokens).low <= 0:
                tied.append(rate)
        return min(tied)


def work(setting: dict[str, Any]) -> Result:
    """What one process does: count the tokens of the rows, or train and measure."""
    return counted(setting) if setting.get("counted") else measure(setting)


def measured_methods() -> list[MethodName]:
    """All that can be trained on the embedded base."""
    return [method for method in METHODS if method not in NOT_MEASURED]


def run_all(sweep: Sweep) -> dict[MethodName, dict[str, Any]] | None:
    """The best rate of every method; None where runs are missing still. A failed method does not stop the others."""
    found: dict[MethodName, dict[str, Any]] = {}
    for method in measured_methods():
        try:
            found[method] = sweep.best(method)
        except Failed:
            continue
        except OutOfTime as next_one:
            print(f"the minutes are over before {next_one}; start again to go on", file=sys.stderr)
            return None
    return None if sweep.lab.failures else found


def _bits(method: MethodName) -> int:
    """4 where the method trains over them, and 32 otherwise: a CPU computes in float32 anyway."""
    return 4 if 4 in METHODS[method].bits else 32


def _interval(found: Any) -> list[float]:
    return [round(value, 4) for value in (found.point, found.low, found.high)]


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def main() -> int:
    """Run what is missing, and write the summary when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines of the runs; the summary stands beside it")
    parser.add_argument("--minutes", type=float, default=90, help="begin no run that would end later")
    parser.add_argument("--smoke", metavar="BASE", help=argparse.SUPPRESS)  # every method once, 2 steps on a small base
    arguments = parser.parse_args()
    lab = Lab(arguments.results, work, arguments.minutes)
    sweep = Sweep(lab, arguments.smoke)
    methods = run_all(sweep)
    if methods is None:
        for failure in lab.failures:
            print(f"failed: {failure}", file=sys.stderr)
        return 1
    summary = {
        "base": sweep.base,
        "rows": {**sweep.rows, "answer_tokens": sum(sweep.tokens())},
        "train": dict(TRAIN),
        "not_measured": NOT_MEASURED,
        "methods": methods,
    }
    write(arguments.results.with_suffix(".json"), summary, [line["environment"] for line in lab.lines()])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to go on")
