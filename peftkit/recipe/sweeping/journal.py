"""Where a sweep keeps its trials: optuna's journal, a file of lines that only grows, shared by several processes.

Each line is fsynced before it counts, so a kill -9 or a power cut loses at most the line that was being written. The
lock is the kernel's (flock): it ends with the process that holds it, whereas optuna's own lock files outlive theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from peftkit.extras import extra

JOURNAL = "journal.jsonl"
_STUDY = "sweep"


class _Lock:
    """The two verbs that optuna asks of a lock."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def open_study(folder: Path) -> Any:
    """The optuna study of a sweep, made if there is none; it minimises. Raises ConfigError without optuna."""
    with extra("search", "a sweep"):
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path, lock = folder / JOURNAL, _Lock(folder / f".{JOURNAL}.lock")
    _mend(path, lock)
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
    try:
        return optuna.load_study(study_name=_STUDY, storage=storage)
    except KeyError:  # of two that begin at once, the second finds what the first made
        return optuna.create_study(study_name=_STUDY, storage=storage, direction="minimize", load_if_exists=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While inside, no other process of the sweep takes a trial or writes its results."""
    with FileLock(folder / ".sweep.lock"):
        yield


def _mend(path: Path, lock: _Lock) -> None:
    """Cut off a line that a full disk or a power cut left without its end: optuna reads no further than it."""
    lock.acquire()
    try:
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    finally:
        lock.release()
