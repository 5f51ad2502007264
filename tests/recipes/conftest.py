"""Places of a test's own, and a small file of rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registry, runs and cache of each test are its own, also for processes that it starts."""
    for name in ("registry", "runs", "cache"):
        monkeypatch.setenv(f"PEFTKIT_{name.upper()}", str(tmp_path / name))


@pytest.fixture
def short_rows(tmp_path: Path) -> Path:
    """A user's own file: 16 short questions and answers."""
    draw = random.Random(0)
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {draw.randrange(1000)} {i}", "completion": str(draw.randrange(9999))} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
