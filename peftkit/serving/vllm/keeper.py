"""Runs a command that must not outlive whoever asked for it: however they end, its processes and its folder go too.

Run by its path with Python alone (`python -I keeper.py FOLDER COMMAND…`), so that it starts at once and stays small.
Its standard input is a pipe which the asker holds and never writes to: when that closes, the asker is gone. On its
standard output it says `started PID`, and `ended STATUS` when the command ends by itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL: vLLM frees the devices in about two."""


def keep(folder: str, command: list[str]) -> int:
    """Run `command` in a process group of its own, its output in `folder`, until it ends or standard input does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the asker decides; the command would inherit SIG_IGN, and no handler
    with open(os.path.join(folder, "vllm.log"), "ab") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    _say(f"started {child.pid}")
    waiting = threading.Thread(target=_wait, args=(child,), daemon=True)
    waiting.start()
    while os.read(0, 1):
        pass
    if waiting.is_alive():
        _signal(child.pid, signal.SIGTERM)
        waiting.join(GRACE)
    if waiting.is_alive():
        _signal(child.pid, signal.SIGKILL)
        waiting.join()
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _wait(child: subprocess.Popen[bytes]) -> None:
    status = child.wait()
    _signal(child.pid, signal.SIGKILL)  # what it started and left behind
    _say(f"ended {status}")


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(group, number)


def _say(line: str) -> None:
    with suppress(BrokenPipeError):  # the asker is gone
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
