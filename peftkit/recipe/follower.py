"""The run folder of the processes that write nothing: in a run of several, the first one keeps the diary of all."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.events import Event, silent
from peftkit.process_group import ProcessGroup
from peftkit.runs import RunFolder


class FollowerFolder(RunFolder):
    """A folder of its own for what a trainer must put somewhere, gone when the process ends; records nothing."""

    def __init__(self, group: ProcessGroup) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"peftkit-process-{group.rank}-"))
        self.id = f"process {group.rank} of {group.size}"
        self.lost = 0
        self.notify = silent
        atexit.register(shutil.rmtree, self.path, ignore_errors=True)

    def record(self, event: Event) -> None:
        """Nothing: the first process records it."""

    def log_metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Nothing: the first process has the same figures."""

    def write_text(self, name: str, text: str) -> Path:
        """Nothing: the first process writes it."""
        return self.path / name

    def write_page(self, *, force: bool = False) -> None:
        """Nothing."""

    def finish(self, state: Any, **facts: Any) -> None:
        """Nothing: the first process writes how the run ended."""
