"""Runs of one setting each, every one in a fresh process, kept as JSON lines: what stands there is not run again.

A fresh process makes peak memory the run's own. It is forked from a server that has imported the libraries, which
saves some seconds a run. Ctrl-C loses the run in progress and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from math import log
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peftkit.environment import environment

Result = dict[str, Any]
LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3))
"""The learning rates that are tried: 1e-7, 3e-7, 1e-6 … 3."""
ONE_RATE = -1
LIMIT = 1800
"""Seconds after which a run is given up."""


class OutOfTime(Exception):
    """The next run would not end within the minutes that were given."""


class Failed(Exception):
    """A run raised an error; nothing was kept of it, so the next start tries it again."""


class Lab:
    """Measures settings and remembers the results in a file."""

    def __init__(self, file: Path, measure: Callable[[dict[str, Any]], Result], minutes: float | None) -> None:
        self.file, self.measure, self.minutes = file, measure, minutes
        self.began, self.longest = time.perf_counter(), 0.0
        self.failures: list[str] = []
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["peftkit.training.sft", "peftkit.tuning.inject"])
        self.done: dict[str, Result] = {_key(line["setting"]): line["result"] for line in self.lines()}

    def lines(self) -> list[dict[str, Any]]:
        """What was measured so far, whole lines only: a kill may leave half of the last one."""
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def run(self, what: str, setting: dict[str, Any]) -> Result:
        """The result of a setting, from the file or measured now. Raises OutOfTime and Failed."""
        key = _key(setting)
        if key not in self.done:
            result = self._measured(what, setting)
            self._append({"what": what, "setting": setting, "result": result, "environment": environment()})
            self.done[key] = result
        return self.done[key]

    def _measured(self, what: str, setting: dict[str, Any]) -> Result:
        started = time.perf_counter()
        if self.minutes is not None and started - self.began + self.longest > 60 * self.minutes:
            raise OutOfTime(what)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run's process ends with this one
        result: Result = {}
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_send, args=(sender, self.measure, setting))
        process.start()
        try:
            sender.close()  # or the end of the process would not be the end of the pipe
            if receiver.poll(LIMIT):
                result, error = receiver.recv()
            else:
                error = f"it took more than {LIMIT} seconds"
        except EOFError:
            error = "its process was killed"
        finally:
            process.kill()
            process.join()
        if error is not None:
            self.failures.append(f"{what}: {error.strip().splitlines()[-1]}")
            print(f"{what} failed: {error}", file=sys.stderr, flush=True)
            raise Failed(what)
        seconds = time.perf_counter() - started
        self.longest = max(self.longest, seconds)
        shown = {name: value for name, value in result.items() if not isinstance(value, list)}
        print(json.dumps({"what": what, **shown, "wall_seconds": round(seconds, 1)}), flush=True)
        return result

    def _append(self, line: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(json.dumps(kept) + "\n" for kept in self.lines())
        if self.file.exists() and self.file.stat().st_size != len(whole.encode()):
            self.file.write_text(whole, encoding="utf-8")
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def best_rate(start: float, score: Callable[[float], float], *, beyond: int) -> tuple[float, dict[float, float], bool]:
    """The rate with the lowest score among the rung of LADDER next to `start` and its two neighbours.

    While the lowest score is at an edge, one more rung is tried there, at most `beyond` times. Returns the rate, all
    scores by rate, and whether the rate is still at an edge. ONE_RATE in place of `beyond` tries a single rung.
    """
    at = min(range(len(LADDER)), key=lambda rung: abs(log(LADDER[rung] / start)))
    low, high = (at, at) if beyond == ONE_RATE else (at - 1, at + 1)
    scores: dict[int, float] = {}
    while True:
        scores |= {rung: score(LADDER[rung]) for rung in range(low, high + 1) if rung not in scores}
        best = min(scores, key=lambda rung: (scores[rung], rung))
        edge = best in (low, high)
        if not edge or beyond <= 0 or best in (0, len(LADDER) - 1):
            return LADDER[best], {LADDER[rung]: scores[rung] for rung in sorted(scores)}, edge
        low, high, beyond = low - (best == low), high + (best == high), beyond - 1


def write(file: Path, summary: Mapping[str, Any], environments: Sequence[dict[str, Any]]) -> None:
    """Write a summary with what it was measured on; several environments are told apart."""
    different = [json.loads(text) for text in dict.fromkeys(json.dumps(found) for found in environments)]
    whole = {"environment": different[0] if len(different) == 1 else different, **summary}
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}", flush=True)


def _send(sender: Connection, measure: Callable[[dict[str, Any]], Result], setting: dict[str, Any]) -> None:
    try:
        sender.send((measure(setting), None))
    except Exception:
        sender.send((None, traceback.format_exc()))


def _key(setting: Mapping[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)
