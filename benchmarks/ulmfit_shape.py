"""The shape of ULMFiT's ablation on sst2 and ag_news with a real encoder, and verdicts by docs/decisions/0018.

    PEFTKIT_TEST_DATA=/path/to/data OMP_NUM_THREADS=1 nice python benchmarks/ulmfit_shape.py --plan
    PEFTKIT_TEST_DATA=/path/to/data OMP_NUM_THREADS=1 nice python benchmarks/ulmfit_shape.py

Arms, rows, rates, seeds and the rule stand in docs/decisions/0018, which was committed before the first run. `--plan`
measures the speed of each way of training and says how long all runs will take. `--data sst2` and `--data ag_news` may
run side by side: each has a file of lines of its own (results/ulmfit_shape_*.jsonl), one for every finished run: after
Ctrl-C or the minutes, start it again and it goes on. All runs share one process. The summary (ulmfit_shape.json, with
ULMFiT's published column, versions and hardware) is written when the runs of both data sets are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lab import Lab, OutOfTime, Result, write
from ulmfit_shape_arms import ARMS, AT_MOST_ROWS, BASE, COURSES, QUANT, backbone_of, speed, train_spec, trained
from ulmfit_shape_rows import LABELS, LONGEST, TEST, VALIDATION, Rows, load
from ulmfit_shape_rule import Numbers, difference, lines, record

from peftkit.training.sft import Stopped

RESULTS = Path(__file__).with_name("results")
SEEDS = (0, 1, 2)
SMALLER = 50
"""What --smoke divides the numbers of rows by."""
LIKE_FULL = ("scratch", "full_decay", "gradual_top_down", "gradual_bottom_up", "full_discr_stlr", "gradual_discr_stlr")
"""Arms that are planned with the speed of `full`; unfreezing from the top is faster."""


class OneProcess(Lab):
    """A lab whose runs share this process."""

    def _measured(self, what: str, setting: dict[str, Any]) -> Result:
        started = time.perf_counter()
        if self.minutes is not None and started - self.began + self.longest > 60 * self.minutes:
            raise OutOfTime(what)
        result = self.measure(setting)
        self.longest = max(self.longest, time.perf_counter() - started)
        print(json.dumps({"what": what, "cpu_seconds": result.get("cpu_seconds")}), flush=True)
        return result


class Study:
    """The runs of one data set, from its file or made now."""

    def __init__(self, data: str, results: Path, minutes: float | None, *, smoke: bool) -> None:
        self.data, self.smaller = data, SMALLER if smoke else 1
        self.seeds = SEEDS[:1] if smoke else SEEDS
        self.lab = OneProcess(results / f"ulmfit_shape_{data}.jsonl", self.work, minutes)

    @cached_property
    def rows(self) -> Rows:
        """The encoded rows."""
        return load(self.data, backbone_of(self.data, self.seeds[0], False).tokenizer.hf)

    def work(self, setting: dict[str, Any]) -> Result:
        """One run, or one measurement of speed."""
        n, rows = setting["n"] // self.smaller, self.rows
        held = {"test": rows.test[: TEST // self.smaller]}
        if setting["seed"] == self.seeds[0] and COURSES[setting["n"]].rates_of is None:
            held["validation"] = rows.validation[: VALIDATION // self.smaller]
        spec = train_spec(ARMS[setting["arm"]], n, COURSES[setting["n"]], setting["rate"], setting["seed"])
        make = speed if setting.get("speed") else trained
        return make(self.data, setting["arm"], spec, rows.draw(n, setting["seed"]), held)

    def setting(self, name: str, n: int, rate: float, seed: int) -> dict[str, Any]:
        """All that a run depends on."""
        arm, course = ARMS[name], COURSES[n]
        held = {"longest": LONGEST, "test": TEST, "validation": VALIDATION, "divided_by": self.smaller}
        train = train_spec(arm, n // self.smaller, course, rate, seed).model_dump(exclude_defaults=True)
        how = {"adapter": dict(arm.adapter), "train": train, "epochs": course.epochs}
        known = {"base": BASE, "quant": QUANT, "data": self.data, "sha256": self.rows.sha256, "rows": held}
        return {**known, "arm": name, "n": n, "rate": rate, "seed": seed, **how}

    def run(self, name: str, n: int, rate: float, seed: int) -> Result:
        """One run."""
        return self.lab.run(f"{self.data} {n}: {name}, rate {rate:g}, seed {seed}", self.setting(name, n, rate, seed))

    def searched(self, name: str, n: int) -> dict[float, tuple[float, float]]:
        """Every rate that was tried, with error and mean NLL of the validation rows at the first seed."""
        found = {}
        for rate in ARMS[name].rates if self.smaller == 1 else ARMS[name].rates[1:2]:
            part = self.run(name, n, rate, self.seeds[0])["validation"]
            found[rate] = (error_of(part["wrong"]), part.get("nll", np.inf))
        return found

    def rate(self, name: str, n: int) -> float:
        """The rate with the lowest validation error, of equals the one with the lower NLL."""
        tried = self.searched(name, COURSES[n].rates_of or n)
        return min(tried, key=lambda rate: tried[rate])

    def errors(self, name: str, n: int) -> Numbers:
        """1 for a wrong test row, 0 for a right one; of shape (seeds, rows)."""
        runs = (self.run(name, n, self.rate(name, n), seed) for seed in self.seeds)
        return np.array([[float(mark) for mark in run["test"]["wrong"]] for run in runs])

    def run_all(self) -> bool:
        """Make every run that is missing, seed by seed; False where some are left."""
        try:
            for seed in self.seeds:
                for n in COURSES:
                    for name in arms_at(n):
                        self.run(name, n, self.rate(name, n), seed)
        except OutOfTime as next_one:
            print(f"the minutes are over before {next_one}; start again to go on", file=sys.stderr)
            return False
        return True

    @property
    def complete(self) -> bool:
        """Whether all runs are in the file."""
        self.lab.measure = _refuse
        try:
            return self.run_all()
        except LookupError:
            return False
        finally:
            self.lab.measure = self.work

    def speeds(self, name: str, n: int) -> Result:
        """What a way of training costs at a number of rows."""
        name = "full" if name in LIKE_FULL else name
        n = COURSES[n].rates_of or n
        setting = {**self.setting(name, n, ARMS[name].rates[1], self.seeds[0]), "speed": True}
        return self.lab.run(f"{self.data} {n}: speed of {name}", setting)

    def plan(self) -> dict[str, float]:
        """Expected CPU seconds by number of rows, those of measuring included."""
        tokens = float(np.mean([len(example.input_ids) for example in self.rows.pool]))
        found = {}
        for n, course in COURSES.items():
            runs = len(self.seeds) + (0 if course.rates_of else len(ARMS["full"].rates) - 1)
            each = 0.0
            for name in arms_at(n):
                cost = self.speeds(name, n)
                each += cost["startup_seconds"] + tokens * n * course.epochs / cost["tokens_per_second"]
                each += tokens * (TEST + VALIDATION) / cost["measured_tokens_per_second"]
            found[str(n)] = round(runs * each, 1)
        return found


def _refuse(setting: dict[str, Any]) -> Result:
    raise LookupError(setting["arm"])


def arms_at(n: int) -> tuple[str, ...]:
    """The arms that are trained on so many rows."""
    return AT_MOST_ROWS if COURSES[n].rates_of else tuple(ARMS)


def error_of(wrong: str) -> float:
    """The share of wrong rows."""
    return wrong.count("1") / len(wrong)


def cell(study: Study, name: str, n: int) -> dict[str, Any]:
    """The figures of one arm; errors in %."""
    arm, rate = ARMS[name], study.rate(name, n)
    runs = [study.run(name, n, rate, seed) for seed in study.seeds]
    tried = study.searched(name, COURSES[n].rates_of or n)
    return {
        "rate": rate,
        "rate_at_edge": rate in (arm.rates[0], arm.rates[2]),
        "validation_error": {f"{one:g}": round(100 * error, 2) for one, (error, _) in tried.items()},
        "error": record(difference([study.errors(name, n)])),
        "by_seed": [round(100 * error_of(run["test"]["wrong"]), 2) for run in runs],
        "nll": [run["test"].get("nll") for run in runs],
        "trained_numbers": runs[0]["trained_numbers"],
        "steps": runs[0].get("steps"),
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        "published": dict(arm.published),
    }


def summary(studies: dict[str, Study]) -> dict[str, Any]:
    """Every arm's figures, and the verdicts."""

    def errors(data: str, name: str, n: int) -> Numbers:
        return studies[data].errors(name, n)

    return {
        "base": BASE,
        "quant": QUANT,
        "rows": {"test": TEST, "validation": VALIDATION, "longest": LONGEST},
        "seeds": list(SEEDS),
        "published": "Howard and Ruder 2018, arXiv 1801.06146, Table 7: validation error in %, all training rows",
        "cells": {
            data: {str(n): {name: cell(study, name, n) for name in arms_at(n)} for n in COURSES}
            for data, study in studies.items()
        },
        "verdicts": lines(errors, tuple(studies), tuple(ARMS)),
        "cpu_hours": round(sum(_spent(study) for study in studies.values()) / 3600, 2),
    }


def _spent(study: Study) -> float:
    return sum(float(line["result"].get("cpu_seconds") or 0) for line in study.lab.lines())


def main() -> int:
    """Plan, or run what is missing, and write the summary when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(LABELS), help="the runs of one data set only")
    parser.add_argument("--plan", action="store_true", help="measure speeds, say how long all runs take, and stop")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines and the summary")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # a fiftieth of the rows, one seed
    asked = parser.parse_args()
    studies = {data: Study(data, asked.results, asked.minutes, smoke=asked.smoke) for data in LABELS}
    chosen = [studies[asked.data]] if asked.data else list(studies.values())
    for study in chosen:
        expected = study.plan()
        print(json.dumps({"data": study.data, "expected_cpu_seconds": expected}), flush=True)
        print(f"{study.data}: {sum(expected.values()) / 3600:.2f} hours of one core expected in all", file=sys.stderr)
    if asked.plan:
        return 0
    unfinished = [study.data for study in chosen if not study.run_all()]
    if unfinished:
        return 1
    if asked.data and not all(study.complete for study in studies.values()):
        print("the other data set's runs are missing; the summary is written when they are there", file=sys.stderr)
        return 0
    file = asked.results / "ulmfit_shape.json"
    environments = [line["environment"] for study in studies.values() for line in study.lab.lines()]
    write(file, summary(studies), environments)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Stopped):
        sys.exit("interrupted; start again to go on")
