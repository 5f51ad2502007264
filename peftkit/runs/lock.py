"""One writer per run folder: a lock that a process holds while it writes, and that its death releases."""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from peftkit.errors import RunError

LOCK = ".lock"


def hold(run: Path) -> BaseFileLock:
    """Take the lock of a run folder and keep it until it is released, dropped, or the process ends.

    Raises RunError at once when another holds it, or when the folder cannot be locked.
    """
    lock = FileLock(run / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(
            f"another process holds the run {run.name}",
            expected="a run that nobody trains, resumes or removes at this moment",
            hint="wait until that process has ended, and try again",
        ) from None
    except (OSError, NotImplementedError) as error:
        raise RunError(f"the run {run} cannot be locked: {error}", expected="a folder that can be written") from error
    return lock
