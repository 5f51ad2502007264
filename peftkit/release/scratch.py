"""Folders for what is in the way for a while: gone when their block ends, or when the next one begins after a kill."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def scratch_folder(root: Path, purpose: str) -> Iterator[Path]:
    """A new empty folder below `root`; what killed processes left there is removed first.

    A folder is somebody's as long as the lock beside it is held, which ends with its process.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    folder = root / f"{purpose}-{secrets.token_hex(8)}"
    lock = FileLock(_lock_of(folder))
    with lock:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    for path in root.glob("*.lock"):
        with suppress(Timeout, OSError), FileLock(path, timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
