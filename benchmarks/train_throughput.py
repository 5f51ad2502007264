"""Training speed and memory at equal loss: peftkit, TRL as it comes, and TRL with the best settings of a search.

    python benchmarks/train_throughput.py                     # mixed rows, float32 and NF4
    python benchmarks/train_throughput.py --full              # short, mixed and long rows; some hours
    python benchmarks/train_throughput.py --ablation flat     # and with padded rows: the share of laying them flat
    python benchmarks/train_throughput.py --smoke             # whether all of it runs; writes nothing

The embedded base, LoRA of rank 16 on all linear layers, AdamW, rate 1e-4, steps of 8 rows, the same rows in the same
steps for all arms but where TRL groups or packs (`trl_search.py`). Both libraries train over the same backbone; over
NF4 it stays packed. Every run has a process of its own, and the arms take turns. Losses are means over the answer
tokens of the epoch. The fastest settings of the search (`trl_search.py`, few rows) are measured on all rows; the
fastest at equal loss is the opponent. `ceiling` is measured between the arms: `train_throughput_arms.py` says of what.

Runs are kept as JSON lines until all are there, so an interrupted measurement goes on when it is started again. Then
they go into benchmarks/results/train_throughput.json, each cell with versions and hardware; cells that were not
measured again stay. The searches' runs stay in train_throughput_search.jsonl: a machine or version that is not
in it is searched first, about 10 minutes more. NF4 takes float32's first two settings; with --full it has a search.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lab import Failed, Lab, OutOfTime, Result
from train_throughput_arms import ALPHA, RATE, SHORTCUTS, STEP_ROWS, R, measure
from train_throughput_goals import ablation_shares, cell_name, goals, linear, opponent, summed
from train_throughput_llamafactory import VARIABLE, python
from train_throughput_rows import rows_setting
from trl_arms import DEFAULTS
from trl_search import CANDIDATES, name_of, search

from peftkit.atomic import replace_file
from peftkit.environment import environment

RESULTS = Path(__file__).with_name("results") / "train_throughput.json"
ROWS = {"short": 48, "mixed": 48, "long": 24}
SEARCHED = {"short": 48, "mixed": 16, "long": 16}
"""Rows of a candidate's run: at least two steps."""
PROFILED = 16
LINEAR = (5, 48, 264)
"""Mixed rows of about 1,000, 10,000 and 50,000 tokens."""


class Bench:
    """Measures the cells of the matrix; what a file of lines has is not measured again."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.lab = Lab(folder / "train_throughput.jsonl", measure, options.minutes)
        self.searches = Lab(folder / "train_throughput_search.jsonl", measure, options.minutes)
        self.sizes = (dict.fromkeys(ROWS, 16), dict.fromkeys(ROWS, 16)) if options.smoke else (ROWS, SEARCHED)
        self.cells = [(bits, name) for name in options.rows for bits in options.bits]
        self.found: dict[tuple[int, str], dict[str, Any]] = {}

    def search(self, bits: int, name: str) -> dict[str, Any]:
        """What TRL is fastest with for a kind of rows, over a base of so many bits."""
        if bits != 32 and not self.options.full:
            return {"fastest": self.search(32, name)["fastest"][:2], "of": cell_name(32, name), "tried": []}
        setting = {"arm": "trl", "bits": bits, "rows": rows_setting(name, self.sizes[1][name]), "on": environment()}

        def run(what: str, training: dict[str, Any]) -> Result:
            return self.searches.run(f"search {cell_name(bits, name)}: {what}", {**setting, "training": training})

        if (bits, name) not in self.found:
            self.found[bits, name] = search(run, CANDIDATES[:2] if self.options.smoke else CANDIDATES)
        return self.found[bits, name]

    def run(self, what: str, arm: str, bits: int, name: str, count: int, **more: Any) -> Result:
        """One measurement of an arm on a kind of rows."""
        setting = {"arm": arm, "bits": bits, "rows": rows_setting(name, count), "on": environment(), **more}
        return self.lab.run(f"{cell_name(bits, name)}: {what}", setting)

    def arms(self, bits: int, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
        """Every arm of a cell by name: which library, and what it is told."""
        found: dict[str, tuple[str, dict[str, Any]]] = {
            "peftkit": ("peftkit", {}),
            **{f"trl, {name_of(one)}": ("trl", {"training": one}) for one in self.search(bits, name)["fastest"]},
            "trl defaults": ("trl", {"training": DEFAULTS}),
            **{f"without {shortcut}": ("peftkit", {"without": [shortcut]}) for shortcut in self.options.ablation},
        }
        if bits == 32 and (executable := python()) is not None:
            found["llamafactory"] = ("llamafactory", {"python": executable})
        return found

    def measured(self) -> dict[tuple[int, str], dict[str, list[Result]]]:
        """All arms of all cells, in turn: forwards in one round and backwards in the next, the ceiling in between."""
        arms = {cell: self.arms(*cell) for cell in self.cells}
        turns = [
            (bits, name, arm)
            for name in self.options.rows
            for arm in dict.fromkeys(arm for bits in self.options.bits for arm in arms[bits, name])
            for bits in self.options.bits
            if arm in arms[bits, name]
        ]
        runs: dict[tuple[int, str], dict[str, list[Result]]] = {cell: {"ceiling": []} for cell in self.cells}
        for number in range(self.options.rounds):
            for bits, name, arm in turns[:: -1 if number % 2 else 1]:
                if arm in ("peftkit", "trl defaults") and bits == self.options.bits[0]:
                    setting = {"arm": "ceiling", "bits": 32, "before": [arm, name, number], "on": environment()}
                    found = self.lab.run(f"ceiling, round {number}", setting)
                    for each in self.options.bits:
                        runs[each, name]["ceiling"].append(found)
                library, told = arms[bits, name][arm]
                result = self.run(arm, library, bits, name, self.sizes[0][name], round=number, **told)
                runs[bits, name].setdefault(arm, []).append(result)
        return runs

    def profiles(self, bits: int, name: str, rival: str | None) -> dict[str, Any]:
        """Where one step's time goes, in peftkit and in the opponent; none where a run was refused."""
        found = {}
        for arm in ("peftkit", rival) if rival else ("peftkit",):
            library, told = self.arms(bits, name)[arm]
            result = self.run(f"profile of {arm}", library, bits, name, PROFILED, profile=True, **told)
            found[arm] = result.get("profile")
        return found

    def linear(self) -> list[dict[str, Any]]:
        """Time per token as the run gets longer."""
        counts = (5, 16) if self.options.smoke else LINEAR
        kind = "short" if self.options.smoke else "mixed"
        return linear([self.run(f"linear, {count} rows", "peftkit", 32, kind, count, linear=True) for count in counts])

    def summary(self) -> dict[str, Any]:
        """Run what is missing, and put it together. Raises OutOfTime and Failed."""
        runs = self.measured()
        cells: dict[str, dict[str, Any]] = {}
        for (bits, name), arms in runs.items():
            ceilings = arms.pop("ceiling")
            cell: dict[str, Any] = {
                "rows": {key: arms["peftkit"][0][key] for key in ("rows", "tokens", "answer_tokens", "longest")},
                "arms": {arm: summed(results) for arm, results in arms.items()},
                "ceiling": {**max(ceilings, key=lambda one: float(one["tokens_per_second"])), "n": len(ceilings)},
                "search": self.search(bits, name),
                "runs": arms,
                "environment": environment(),
            }
            cell["opponent"] = opponent(cell["arms"])
            cell["ablation_shares"] = ablation_shares(cell)
            if self.options.full or bits == 32:
                cell["profile"] = self.profiles(bits, name, cell["opponent"])
            cells[cell_name(bits, name)] = cell
        return {"cells": cells, "linear": {"lines": self.linear(), "environment": environment()}}


def absent() -> dict[str, str]:
    """Rivals that were not measured, and why."""
    found = {"mlx-lm": "runs on macOS alone; not measured" if sys.platform != "darwin" else "not measured"}
    if python() is None:
        found["llamafactory"] = f"not installed: set {VARIABLE} to a Python that has it"
    return found


def keep(file: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Put the measured cells among those that the results have; the goals are those of all of them."""
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    cells = {**kept.get("cells", {}), **measured["cells"]}
    setting = {"r": R, "lora_alpha": ALPHA, "learning_rate": RATE, "rows_per_step": STEP_ROWS}
    whole = {
        "setting": {**setting, "threads": torch.get_num_threads()},
        "goals": goals(cells),
        "absent": absent(),
        "linear": measured["linear"],
        "cells": cells,
    }
    file.parent.mkdir(exist_ok=True)
    replace_file(file, json.dumps(whole, indent=1) + "\n")
    return whole


def said(summary: dict[str, Any]) -> None:
    """One JSON line for every arm, then one for every goal."""
    for name, cell in summary["cells"].items():
        for arm, figures in cell["arms"].items():
            print(json.dumps({"cell": name, "arm": arm, **figures}))
        print(json.dumps({"cell": name, "opponent": cell["opponent"], "ceiling": cell["ceiling"]}))
        for shortcut, share in cell["ablation_shares"].items():
            print(json.dumps({"cell": name, "without": shortcut, **share}))
    for line in summary.get("linear", {}).get("lines", []):
        print(json.dumps({"linear": line}))
    for name, why in absent().items():
        print(json.dumps({"absent": name, "why": why}))
    for goal in goals(summary["cells"]):
        print(json.dumps(goal))


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all kinds of rows, two rounds, every search a whole one")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="kinds of rows")
    parser.add_argument("--bits", nargs="+", type=int, choices=(32, 4), default=[32, 4])
    parser.add_argument("--rounds", type=int, help="how often each arm is measured")
    parser.add_argument(
        "--ablation", nargs="+", choices=list(SHORTCUTS), default=[], help="arms without these shortcuts"
    )
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--smoke", action="store_true", help="16 short rows and two candidates; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines of the runs stand beside it")
    found = parser.parse_args()
    found.rows = found.rows or (["short"] if found.smoke else list(ROWS) if found.full else ["mixed"])
    found.rounds = found.rounds or (2 if found.full else 1)
    return found


def main() -> int:
    """Run what is missing; write, and drop the lines of this measurement, when nothing is."""
    asked = options()
    if asked.smoke:
        with tempfile.TemporaryDirectory() as folder:
            said(Bench(Path(folder), asked).summary())
        return 0
    bench = Bench(asked.results.parent, asked)
    try:
        summary = bench.summary()
    except OutOfTime as next_one:
        print(f"the minutes are over before {next_one}; start again to go on", file=sys.stderr)
        return 1
    except Failed as failed:
        print(f"failed: {failed}; start again to go on", file=sys.stderr)
        return 1
    keep(asked.results, summary)
    bench.lab.file.unlink(missing_ok=True)
    said(summary)
    print(f"written: {asked.results}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to go on")
