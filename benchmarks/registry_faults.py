"""Crash, fail and kill every operation of the registry at every point, and print what was left as a table.

    python benchmarks/registry_faults.py

The table goes to benchmarks/results/registry_faults.json with versions and hardware; the exit status is 1 if any state
is bad. The states of an error are those of a crash after the operation was done again; its outcomes are what the error
itself left, one for each point. `tests/faults` says what a crash may leave (disk.py) and what a bad state is
(operations.py).
"""

from __future__ import annotations

import errno
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from peftkit.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faults.kills import kill_at_random
from faults.lab import Lab, Report, Trace, memory
from faults.operations import OPERATIONS
from faults.scenarios import (
    ERRORS,
    after_a_kill,
    cases,
    error_points,
    failing,
    first_level,
    next_level,
    starts,
)
from faults.sites import fsync_sites

RESULTS = Path(__file__).with_name("results") / "registry_faults.json"
KILLS = 1000
Table = dict[tuple[str, str], Report]


def single(lab: Lab, table: Table) -> None:
    """Every operation on an empty and on a stocked registry: crashes, kills followed by anything, and all errors."""
    for start in starts(lab):
        for case in cases(lab, start):
            for trace in after_a_kill(lab, case, list(OPERATIONS)):
                again = trace.steps[-1].plan is case.step.plan
                table[case.name, "power off after a kill and one more operation"].add(lab.explore(trace, again=again))
            for code, number in error_points(case):
                for lasting in (False, True):
                    table[case.name, errno.errorcode[code]].add(failing(lab, case, code, number, lasting=lasting)[1])


def sequences(lab: Lab, table: Table) -> list[int]:
    """Every sequence of up to three operations; returns how many there are of each length."""
    dice, counts = random.Random(0), [0, 0, 0]
    for start in starts(lab):
        level, seen = first_level(start), set[object]()
        for length in range(3):
            level, fresh = next_level(lab, level, seen)
            counts[length] += sum(level.sequences.values())
            for case in fresh:
                table[case.name, "power off"].add(lab.explore(Trace(case.start, [case.step])))
                if length:
                    for code, number in dice.sample(list(error_points(case)), 3):
                        found = failing(lab, case, code, number, lasting=dice.random() < 0.5)[1]
                        table[case.name, errno.errorcode[code]].add(found)
    return counts


def main() -> int:
    """Run everything and write the table."""
    begun, table = time.monotonic(), defaultdict[tuple[str, str], Report](Report)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        lab = Lab(Path(folder))
        single(lab, table)
        counts = sequences(lab, table)
        table["any of these, up to three in a row", "kill -9"].add(kill_at_random(lab, KILLS, seed=9))
        distinct = lab.distinct
    rows = [
        {
            "operation": name,
            "fault": fault,
            "points": report.points,
            "states": report.states,
            **{outcome: report.outcomes[outcome] for outcome in ("old", "between", "new")},
            "bad": len(report.bad),
        }
        for (name, fault), report in sorted(table.items())
    ]
    total = {key: sum(row[key] for row in rows) for key in ("points", "states", "old", "between", "new", "bad")}
    print(f"{'operation':38} {'fault':46} {'points':>7} {'states':>8} {'old':>7} {'between':>7} {'new':>7} {'bad':>4}")
    for row in [*rows, {"operation": "all", "fault": "", **total}]:
        print(
            f"{row['operation']:38} {row['fault']:46} {row['points']:7} {row['states']:8} {row['old']:7}"
            f" {row['between']:7} {row['new']:7} {row['bad']:4}"
        )
    record = {
        "rows": rows,
        "total": total,
        "sequences": {str(length): count for length, count in enumerate(counts, 1)},
        "different_states": distinct,
        "lines_that_fsync": len(fsync_sites()),
        "errors": {errno.errorcode[code]: list(calls) for code, calls in ERRORS.items()},
        "seconds": round(time.monotonic() - begun),
        "environment": environment(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in [bad for report in table.values() for bad in report.bad][:20]:
        print(line)
    return int(total["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main())
