"""The hidden folder beside the output in which a merge is built: locked, kept when interrupted, renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peftkit.durable import move_folder, sync_folder
from peftkit.errors import DeltaError

_LOCK = "lock"


class Building:
    """`.NAME.merging` beside NAME: a lock, the journal, and `model/`, which becomes NAME in one step."""

    def __init__(self, out: Path) -> None:
        """Name the folder; nothing is made yet."""
        self.out = out
        self.folder = out.parent / f".{out.name}.merging"
        self.model = self.folder / "model"
        self.journal = self.folder / "journal.jsonl"

    def check_out(self) -> None:
        """Raise DeltaError when the output exists and holds anything."""
        if self.out.is_symlink() or (self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))):
            raise DeltaError(
                f"{self.out} exists already",
                expected="a folder that does not exist, or is empty",
                hint="choose another --out, or remove it",
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder alone. Raises DeltaError when another process has it, or it cannot be written."""
        lock = FileLock(self.folder / _LOCK, thread_local=False)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            lock.acquire(blocking=False)
            if not lock.is_locked or not (self.folder / _LOCK).exists():  # its holder published and removed the folder
                lock.release()
                raise Timeout(str(self.folder))
        except Timeout:
            raise DeltaError(
                f"another process merges into {self.out}",
                expected="one merge at a time for one folder",
                hint="wait until it has ended, or choose another --out",
            ) from None
        except (OSError, NotImplementedError) as error:
            raise DeltaError(
                f"{self.folder} cannot be written: {error}", expected="a folder that can be written"
            ) from error
        try:
            self.check_out()
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Begin anew: remove what an earlier merge left."""
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.model, ignore_errors=True)

    def drop(self) -> None:
        """Remove everything; the lock goes with it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, data: bytes) -> None:
        """A whole file of the model, on disk when this returns."""
        path = self.model / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename the model into place; all its files must have been synced."""
        for folder in sorted(path for path in self.model.iterdir() if path.is_dir()):
            sync_folder(folder)
        sync_folder(self.model)
        move_folder(self.model, self.out)
        self.drop()
