"""What many adapters in one batch cost: the bank against the base alone, PEFT's mixed batch, and one at a time.

    python benchmarks/serving.py                          # about 25 minutes; nothing else should run meanwhile
    python benchmarks/serving.py --only mechanisms misses # parts of it; what the file says of the others stays
    python benchmarks/serving.py --quick                  # whether all of it runs; writes nothing

The embedded base in float32 on 2 threads, LoRA of rank 16 on all linear layers, random factors.

mechanisms: one decode step and one prefill of 16 rows of 100 tokens, through the same cache, with 1, 2, 4 and 16
adapters in the batch, neighbouring rows never of one adapter; logits are compared with PEFT's first. Medians of rounds
that go forwards and backwards through the ways in turn; ratios are medians over rounds of the ratio within a round.
Memory of one adapter goes with it.
misses: a seat for an adapter that is resident, in host memory, on disk (files in the page cache, digests checked).
loops: 32 requests of 20 to 200 tokens, 20 to 80 more asked for, each loop in a process of its own, 16 rows at once:
the base by padded `generate`, by transformers' continuous batching and by the engine; then with 4 and 16 adapters.
layouts: the products alone, as docs/decisions/0016 compares them.

One JSON line per measurement; all of them go to benchmarks/results/serving.json with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from serving_layouts import layouts
from serving_loops import LOOPS, OF_THE_BASE, THREADS, run, workload
from serving_mechanisms import (
    AGREE,
    QUICK,
    Sizes,
    Times,
    backbone_of,
    differences,
    memory,
    random_adapters,
    timed,
    ways,
)
from serving_misses import misses, publish

from peftkit.atomic import replace_file
from peftkit.backbone.quiet import quiet
from peftkit.environment import environment

RESULTS = Path(__file__).with_name("results") / "serving.json"
EVEN, OF_BASE = 0.95, 0.8
"""Goals: of the bank's own speed with one adapter, and of the base's."""


def main() -> None:
    """Measure, print and keep."""
    parts: dict[str, Callable[[bool], Any]] = {
        "mechanisms": mechanisms, "misses": missed, "loops": loops, "layouts": products,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--quick", action="store_true", help="one small round of everything; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    for part in options.only:
        with quiet():
            measured = {"threads": THREADS, **parts[part](options.quick), "environment": environment()}
        if not options.quick:
            options.results.parent.mkdir(exist_ok=True)
            kept = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
            replace_file(options.results, json.dumps({**kept, part: measured}, indent=1) + "\n")


def said(line: dict[str, Any]) -> dict[str, Any]:
    """The line, printed with what else the machine had to do."""
    line = {**line, "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(line), flush=True)
    return line


def mechanisms(quick: bool) -> dict[str, Any]:
    """Decode and prefill by every way, and memory; first whether they answer alike."""
    sizes = QUICK if quick else Sizes()
    found, held = ways(backbone_of(), sizes)
    ids = torch.randint(100, 40000, (sizes.rows, sizes.context), generator=torch.Generator().manual_seed(1))
    lines = [said({"what": "memory", **memory(held, sizes)})]
    with torch.inference_mode():
        apart = differences(found, ids[:, :12])
        lines.append(said({"what": "largest difference of a logit from PEFT's", **apart}))
        assert max(apart.values()) <= AGREE, apart
        prefill = timed(found, lambda way: way.prefill(ids), sizes.prefill_rounds, 1, 0)
        decode = timed(found, lambda way: way.step(ids[:, :1]), sizes.rounds, sizes.steps, 1)
    for what, times in (("decode", decode), ("prefill", prefill)):
        for name, spans in times.items():
            figures = {"ms": round(statistics.median(spans), 1), "of_base_speed": ratio(times, "base", name)}
            lines.append(said({"what": what, "way": name, **figures, "rounds": [round(span, 1) for span in spans]}))
    reached = [said(goal) for what, times in (("decode", decode), ("prefill", prefill)) for goal in goals(what, times)]
    return {"rows": sizes.rows, "context": sizes.context, "lines": lines, "goals": reached}


def ratio(times: Times, other: str, way: str) -> float:
    """How fast a way is as a share of another: the median over rounds."""
    return round(statistics.median(a / b for a, b in zip(times[other], times[way], strict=True)), 3)


def goals(what: str, times: Times) -> list[dict[str, Any]]:
    """Each goal with its measured ratio."""
    wanted = []
    for name in (name for name in times if name.startswith("bank ")):
        count = name.removeprefix("bank ")
        wanted.append((name, "base", OF_BASE))
        if count != "1":
            wanted += [(name, "bank 1", EVEN), (name, f"peft adapter_names {count}", 1.0)]
            wanted += [(name, other, 1.0) for other in (f"peft set_adapter {count}",) if other in times]
    lines = []
    for name, other, least in wanted:
        speed = ratio(times, other, name)
        lines.append({"goal": what, "way": name, "against": other, "at_least": least, "measured": speed})
        lines[-1]["reached"] = speed >= least
    return lines


def missed(quick: bool) -> dict[str, Any]:
    """What a miss costs."""
    backbone = backbone_of()
    with tempfile.TemporaryDirectory() as folder:
        count = 4 if quick else 8
        registry = publish(random_adapters(backbone.model, count), Path(folder))
        return {"lines": [said({"what": "miss", **misses(backbone, registry, count, 1 if quick else 5)})]}


def loops(quick: bool) -> dict[str, Any]:
    """All loops, some rounds of them in turn."""
    requests, rounds, counts = (4, 1, (2,)) if quick else (32, 3, (4, 16))
    plan = [(loop, 1) for loop in OF_THE_BASE]
    plan += [(loop, count) for count in counts for loop in LOOPS if loop not in OF_THE_BASE]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in plan}
    with tempfile.TemporaryDirectory() as folder:
        publish(random_adapters(backbone_of().model, max(counts)), Path(folder))
        for number in range(rounds):
            for loop, count in plan[:: 1 if number % 2 == 0 else -1]:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    asks = workload(requests, count)
                    done = process.submit(run, loop, asks, count, Path(folder) / "registry")
                    found[loop, count].append(done.result())
    lines = []
    for (loop, count), runs in found.items():
        reference = found["generate, padded" if loop in OF_THE_BASE else "peft, one adapter after another", count][0]
        same = sum(mine == other for mine, other in zip(runs[0]["answers"], reference["answers"], strict=True))
        speeds = [one["tokens_per_second"] for one in runs]
        fixed = {key: runs[0][key] for key in ("loop", "adapters", "requests", "tokens")}
        peak = max(one["peak_bytes_above_model"] for one in runs)
        figures = {"tokens_per_second": statistics.median(speeds), "rounds": speeds, "peak_bytes_above_model": peak}
        lines.append(said({"what": "loop", **fixed, **figures, "answers_as_reference": same}))
    return {"lines": lines}


def products(quick: bool) -> dict[str, Any]:
    """The layouts of factors."""
    return {"lines": [said({"what": "layout", **line}) for line in layouts(2 if quick else 60)]}


if __name__ == "__main__":
    main()
