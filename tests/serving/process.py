"""`peftkit serve` as a process of its own, over a tiny base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from generation.adapters_lab import Lab
from serving.server_lab import SECONDS

ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    """A server that listens."""

    popen: subprocess.Popen[str]
    address: str
    models: dict[str, str | None]
    errors: Path

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def ended(self) -> int:
        """Its exit code, when it has one."""
        return self.popen.wait(SECONDS)


def command(lab: Lab, names: Sequence[str], *options: str) -> tuple[list[str], dict[str, str]]:
    """What starts it, and its environment."""
    places = {f"PEFTKIT_{name.upper()}": str(lab.folder / name) for name in ("registry", "runs", "cache")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    base = ("--base", str(lab.base), "--bits", "32")
    return [sys.executable, "-m", "peftkit", "serve", *names, *base, "--port", "0", "--json", *options], environment


@contextmanager
def started(lab: Lab, names: Sequence[str], *options: str, planted: str = "") -> Iterator[Process]:
    """Start one and wait until it listens; whatever happens, it is gone afterwards."""
    with begun(lab, names, *options, planted=planted) as (popen, errors):
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line, errors.read_text()
        said = json.loads(line)
        assert said["pid"] == popen.pid
        yield Process(popen, said["address"], said["models"], errors)


@contextmanager
def begun(
    lab: Lab, names: Sequence[str], *options: str, planted: str = ""
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start one, and do not wait; with the file of its standard error. `planted` is Python that it runs before."""
    (python, *arguments), environment = command(lab, names, *options)
    if planted:
        arguments = ["-c", f"{planted}\nfrom peftkit.cli.entry import run\nrun()", *arguments[2:]]
    errors = lab.folder / "serve.stderr"
    with errors.open("w") as stderr:
        popen = subprocess.Popen(
            [python, *arguments], env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        yield popen, errors
    finally:
        popen.kill()
        popen.communicate()
