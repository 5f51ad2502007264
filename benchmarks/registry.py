"""Publish, resolve, list, log and verify in registries of 10, 1,000 and 10,000 versions over 20 bases.

    python benchmarks/registry.py --root /dev/shm

One JSON line per measurement: median and 99th percentile of the time in ms, bytes read and written by one repetition
(system calls, cached or not). Lines are appended to benchmarks/results/registry.jsonl with versions and hardware. The
payloads are tiny, so that what is measured is the registry; `publish 64 MiB` shows what a payload adds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peftkit.environment import environment
from peftkit.registry import Draft, Registry, check_root
from peftkit.registry.index import contents
from peftkit.registry.lineage import lineage
from peftkit.registry.select import Filters, select

RESULTS = Path(__file__).with_name("results") / "registry.jsonl"
BASES = 20
PER_NAME = 5
LARGE = 64 << 20


def payload(folder: Path, size: int) -> Path:
    """A sound adapter whose tensors have `size` bytes."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(size))
    return folder


def draft(number: int, parents: list[dict[str, str]]) -> Draft:
    """A manifest of about the size that a recipe writes."""
    interval = {"point": -0.5, "low": -0.6, "high": -0.4}
    score = {"mean": number % 100 / 100, "n": 64, "metric": "exact"}
    return Draft.model_validate(
        {
            "kind": "peft",
            "base": {"source": f"org/base-{number % BASES}", "fingerprint": f"{number % BASES:064x}"},
            "adapter": {"method": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
            "recipe": {"name": "qlora_sft", "sha256": "1" * 64, "config": {f"setting-{n}": n for n in range(60)}},
            "run": f"run-{number}",
            "data": [{"role": role, "source": f"{role}.jsonl", "sha256": f"{number:064x}", "rows": 100}
                     for role in ("train", "held_out", "retention")],
            "environment": {f"package-{n}": "1.2.3" for n in range(12)},
            "metrics": {"before": {"answer_nll": interval, "score": score},
                        "after": {"answer_nll": interval, "score": score},
                        "other": {"answer_nll_change": interval, "retention_nll_change": interval}},
            "parents": parents,
        }
    )  # fmt: skip


def fill(registry: Registry, count: int, source: Path) -> Iterator[Callable[[], object]]:
    """One publish at a time, each when it is called; every version continues the one before it of its name."""
    for number in range(count):
        name, parents = f"adapter-{number // PER_NAME}", []
        if number % PER_NAME:
            parents = [{"name": name, "version": registry.resolve(name).id, "relation": "continued"}]
        ready = draft(number, parents)
        yield lambda name=name, ready=ready: registry.publish(name, source, ready)


def io() -> tuple[int, int]:
    """Bytes that this process has read and written by system calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def measure(operation: str, actions: Iterable[Callable[[], object]], **facts: Any) -> dict[str, Any]:
    """Time every action; the cost of looking at /proc/self/io is taken off."""
    first, second = io(), io()
    own = second[0] - first[0]
    times, read, written = [], [], []
    for action in actions:
        before = io()
        start = time.perf_counter()
        action()
        times.append((time.perf_counter() - start) * 1000)
        after = io()
        read.append(after[0] - before[0] - own)
        written.append(after[1] - before[1])
    times.sort()
    line = {
        "operation": operation,
        **facts,
        "repetitions": len(times),
        "p50_ms": round(statistics.median(times), 3),
        "p99_ms": round(times[min(len(times) - 1, round(0.99 * (len(times) - 1)))], 3),
        "bytes_read": int(statistics.median(read)),
        "bytes_written": int(statistics.median(written)),
    }
    text = json.dumps({**line, "environment": environment()})
    print(text, flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return line


def run(count: int, scratch: Path, file_system: str) -> None:
    """All measurements on one registry."""
    registry = Registry(scratch / f"registry-{count}")
    facts = {"versions": count, "names": -(-count // PER_NAME), "bases": min(count, BASES), "file_system": file_system}

    def often(operation: str, times: int, action: Callable[[], object]) -> None:
        measure(operation, [action] * times, **facts)

    def cold() -> object:
        registry.layout.index.unlink(missing_ok=True)
        return contents(registry)

    small, large = scratch / "small", scratch / "large"
    measure("publish", fill(registry, count, small), **facts, payload_bytes=bytes_below(small))
    again = [lambda n=n: registry.publish("large", large, draft(n, [])) for n in range(3)]
    measure("publish 64 MiB", again, **facts, payload_bytes=bytes_below(large))
    last = f"adapter-{(count - 1) // PER_NAME}"
    time.sleep(2.1)  # what was written a moment ago is not kept in the index
    version = registry.resolve(last)
    often("resolve name", 200, lambda: registry.resolve(last))
    often("resolve name@prefix", 200, lambda: registry.resolve(f"{last}@{version.id[:6]}"))
    often("list, no index", 3, cold)
    often("list", 20, lambda: select(contents(registry)))
    often("list with filters", 20, lambda: select(contents(registry), Filters("base-1", metrics=("score > 0.5",))))
    often("log", 20, lambda: lineage(registry, last))
    command = [sys.executable, "-m", "peftkit", "list", "--registry", str(registry.root)]
    often("peftkit list, as a process", 5, lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))
    often("verify", 3 if count < 10_000 else 1, lambda: check_root(registry.root, read_data=False))
    often("verify --read-data", 3 if count < 10_000 else 1, lambda: check_root(registry.root, read_data=True))


def bytes_below(folder: Path) -> int:
    """Size of the files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Measure every size in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", type=Path, help="where the registries are made; the system's temporary folder otherwise"
    )
    parser.add_argument("versions", nargs="*", type=int, default=[10, 1_000, 10_000])
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.root) as folder:
        scratch = Path(folder)
        kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False)
        payload(scratch / "small", 4096)
        payload(scratch / "large", LARGE)
        for count in arguments.versions:
            run(count, scratch, kind.stdout.strip() or "unknown")


if __name__ == "__main__":
    main()
