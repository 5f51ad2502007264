"""Merges that are killed, run out of room or meet another one; imported once, then forked. Prints one JSON line each.

interrupted_merge.py BASE FOLDER SCENARIO...   count, kills:N (that many, spread over all writes), full:BYTES, two
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftkit.base.dense import dense_tensors
from peftkit.deltas.delta import Deltas, LowRank
from peftkit.deltas.merge import MergeSettings, merge
from peftkit.deltas.merging import shard
from peftkit.errors import DeltaError
from peftkit.events import Event, Note, Progress

SETTINGS = MergeSettings(onto="original", dtype="bfloat16", shard_size=60_000)
WATCHED = ("write", "fsync", "rename", "replace")


def deltas(base: Path) -> Deltas:
    """A delta for every linear layer, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    changes = {
        name: LowRank(
            (weight.shape[0], weight.shape[1]),
            torch.randn(weight.shape[0], 2, generator=generator) / 10,
            torch.randn(2, weight.shape[1], generator=generator) / 10,
        )
        for name, weight in dense_tensors(base).items()
        if "_proj" in name
    }
    return Deltas("interrupted@1", changes, {})


def forked(action: Callable[[], None]) -> int:
    """How a child process that does `action` ends: its exit status, minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            action()
        except DeltaError as error:
            print(json.dumps({"refused": error.fact}), flush=True)
            os._exit(3)
        finally:
            sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(at: int | None) -> list[int]:
    """Count the calls that change the disk, and kill this process before the one of that number."""
    calls = [0]

    def watched(true: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*args, **kwargs)

        return call

    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name)))
    return calls


def told(event: Event) -> None:
    """Say what a resumed merge begins with."""
    if isinstance(event, Note):
        print(json.dumps({"note": event.text}), flush=True)


def main(base: Path, folder: Path, scenarios: list[str]) -> None:
    """Run every scenario into a folder of its own."""
    shard.SYNC_EVERY = 8000
    for scenario in scenarios:
        if scenario.startswith("kills"):
            calls = int((folder / "calls").read_text())
            number = min(int(scenario.partition(":")[2]), calls)
            points = sorted({1 + (calls - 1) * step // max(number - 1, 1) for step in range(number)})
            main(base, folder, [f"kill:{point}" for point in points])
            continue
        kind, _, value = scenario.partition(":")
        out = folder / scenario.replace(":", "-")
        print(json.dumps({"scenario": scenario}), flush=True)
        ended = forked(lambda: SCENARIOS[kind](base, out, value))  # noqa: B023  called at once
        there = out.exists()
        print(json.dumps({"ended": ended, "published": there}), flush=True)
        if ended and not there:
            print(json.dumps({"ended": forked(lambda: run(base, out))}), flush=True)  # noqa: B023


def run(base: Path, out: Path) -> None:
    """The merge itself."""
    merge(base, deltas(base), out, SETTINGS, report=told)


def kill(base: Path, out: Path, value: str) -> None:
    watch(int(value))
    run(base, out)


def count(base: Path, out: Path, value: str) -> None:
    calls = watch(None)
    run(base, out)
    (out.parent / "calls").write_text(str(calls[0]))


def full(base: Path, out: Path, value: str) -> None:
    """No file may grow beyond some bytes: the kernel then fails writes as it does on a full disk, with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
    run(base, out)


def two(base: Path, out: Path, value: str) -> None:
    """A second process comes while the first is at work."""
    met = []

    def meet(event: Event) -> None:
        if isinstance(event, Progress) and not met:
            met.append(forked(lambda: run(base, out)))

    merge(base, deltas(base), out, SETTINGS, report=meet)
    print(json.dumps({"second": met[0]}), flush=True)


SCENARIOS = {"kill": kill, "count": count, "full": full, "two": two}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
