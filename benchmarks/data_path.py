"""Seconds from a file of rows to the rows of the first step, for 10^3 to 10^5 rows: the first run, and the second.

    python benchmarks/data_path.py --data ../shared/data --base FOLDER [--million]

Rows are alpaca_en_demo's, then copies with a third of their words exchanged. Every measurement is a fresh process that
does what a run does with its data before the first step: read, split, look at the words, encode, count, digest, plan,
schedule, hand over to TRL. The base's weights are not loaded. The second run finds what the first kept in the cache.
`growth` is the time per row against that of the next smaller file: 1 is linear. Results go to
benchmarks/results/data_path.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftkit.environment import environment

RESULTS = Path(__file__).with_name("results") / "data_path.json"
SIZES = (1_000, 10_000, 100_000)


def rows(data: Path, count: int) -> Iterator[str]:
    """So many JSON lines: the real rows, then varied ones."""
    real = json.loads((data / "llamafactory_demo/alpaca_en_demo.json").read_text(encoding="utf-8"))
    draw = random.Random(0)
    words = [word for row in real for word in row["output"].split()]
    for index in range(count):
        row = {key: real[index % len(real)][key] for key in ("instruction", "input", "output")}
        if index >= len(real):
            for key in ("instruction", "output"):
                row[key] = " ".join(draw.choice(words) if draw.random() < 1 / 3 else w for w in row[key].split(" "))
            row["instruction"] += f" ({index})"
        yield json.dumps(row) + "\n"


def measure(file: str, base: str, cache: str) -> None:
    """What a run does with its data before the first step, in this process; prints one JSON line."""
    load = os.getloadavg()[0]  # of everything on the machine: above 1 the seconds are those of a shared one
    from peftkit.base.tokenizer import load_tokenizer
    from peftkit.data.audit import DataSpec, audit
    from peftkit.data.rows import to_dataset
    from peftkit.recipe.lengths import Lengths
    from peftkit.training.bound import rows_digest
    from peftkit.training.schedule import schedule
    from peftkit.training.spec import TrainSpec

    tokenizer = load_tokenizer(Path(base))
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _cpu()
    start = time.perf_counter()
    data = audit(DataSpec(train=file), tokenizer, 8192, cache=Path(cache))
    data.record()
    audited = time.perf_counter() - start
    train, held = data.train.examples, data.held_out.examples
    rows_digest(train), rows_digest(held)
    Lengths.of(train, held, TrainSpec().rows_per_step)
    steps = schedule(train, TrainSpec()).steps
    to_dataset(train)
    first = [train[index] for index in steps[0]]
    seconds = time.perf_counter() - start
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    count = len(data.train.rows) + len(data.held_out.rows)
    print(
        json.dumps(
            {
                "rows": count,
                "tokens": data.train.tokens + data.held_out.tokens,
                "seconds": round(seconds, 2),
                "seconds_audit": round(audited, 2),
                "rows_per_second": round(count / seconds),
                "cpu_seconds": round(_cpu() - cpu, 2),
                "first_step_tokens": sum(len(row.input_ids) for row in first),
                "peak_rss_mb": peaks[0],
                "peak_rss_mb_second_process": peaks[1],
                "rss_mb_before": round(before / 1024),
                "load_before": round(load, 1),
            }
        )
    )


def _cpu() -> float:
    """CPU seconds of this process and of those it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(file: Path, base: Path, cache: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    code = "import sys; sys.path.insert(0, sys.argv[4]); from data_path import measure; measure(*sys.argv[1:4])"
    command = [sys.executable, "-c", code, str(file), str(base), str(cache), str(Path(__file__).parent)]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def growth(results: list[dict[str, Any]]) -> list[float]:
    """Time per row against that of the next smaller file."""
    each = [result["seconds"] / result["rows"] for result in results]
    return [round(after / before, 2) for before, after in pairwise(each)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of real data sets")
    parser.add_argument("--base", type=Path, required=True, help="the folder of a base: its tokenizer renders the rows")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--million", action="store_true", help="10^6 rows too: some 10 GB of memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    first, second = list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        for count in (*arguments.sizes, *((1_000_000,) if arguments.million else ())):
            file = Path(scratch) / f"{count}.jsonl"
            with open(file, "w", encoding="utf-8") as out:
                out.writelines(rows(arguments.data, count))
            for results in (first, second):
                results.append(timed(file, arguments.base, Path(scratch) / "cache"))
                print(json.dumps(results[-1]), flush=True)
    result = {
        "first_run": first,
        "second_run": second,
        "growth_first_run": growth(first),
        "growth_second_run": growth(second),
        "environment": environment(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("growth_first_run", "growth_second_run")}))


if __name__ == "__main__":
    main()
