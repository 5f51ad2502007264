"""Which process is meant, and whether it still runs: pid, start time, boot and host, as JSON values."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from every other; `is_alive` reads it."""
    return {"pid": pid, "started": _started(pid), "boot": _boot(), "host": socket.gethostname()}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the process that began a run still runs; where that cannot be known, the run is believed."""
    if process["host"] != socket.gethostname() or process["started"] is None:
        return True
    # A pid is used again after a while and after every boot: start time and boot tell one process from another.
    return bool(process["boot"] == _boot() and process["started"] == _started(int(process["pid"])))


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where it is gone, a zombie, or there is no /proc."""
    try:
        # The second field is the name of the program, which may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
