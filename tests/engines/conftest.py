"""Engines in their own environments: each has a script `<engine>_reader.py`, JSON on stdin, JSON on stdout."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_RESULTS = _HERE.parents[1] / "benchmarks" / "results" / "engines.json"


@dataclass(frozen=True)
class Engine:
    """One engine, run by its own python."""

    name: str
    python: str

    def ask(self, **request: Any) -> dict[str, Any]:
        """Run the engine's reader on `request`. A fresh process each time: nothing is left over from the last one."""
        command, text = [self.python, str(_HERE / f"{self.name}_reader.py")], json.dumps(request)
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


@pytest.fixture(scope="session")
def engine() -> Callable[[str], Engine]:
    """The engine of a name; skipped, and counted, where PEFTKIT_ENGINE_<NAME> names no python."""

    def find(name: str) -> Engine:
        python = os.environ.get(f"PEFTKIT_ENGINE_{name.upper()}")
        if not python:
            pytest.skip(f"PEFTKIT_ENGINE_{name.upper()} is not set: run `make test-engines`")
        return Engine(name, python)

    return find


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Keep what an engine answered in benchmarks/results/engines.json; other engines and cases stay as they are."""

    def keep(engine: str, version: str, case: str, **figures: Any) -> None:
        known = json.loads(_RESULTS.read_text(encoding="utf-8")) if _RESULTS.exists() else {}
        entry = known.setdefault(engine, {})
        if entry.get("version") != version:  # figures of two versions never stand together
            entry.clear()
        entry |= {"version": version, "date": datetime.now(UTC).date().isoformat()}
        entry.setdefault("cases", {})[case] = figures
        _RESULTS.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        _RESULTS.write_text(text, encoding="utf-8")

    return keep
