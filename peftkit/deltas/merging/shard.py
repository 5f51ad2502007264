"""One file of the merged model while it is written: hashed as it grows, fsynced every 64 MB, journaled after that."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from peftkit.deltas.merging.journal import Journal, Line
from peftkit.deltas.merging.kept import Kept
from peftkit.deltas.merging.layout import Shard

SYNC_EVERY = 64 << 20
"""Bytes that an interruption may cost."""
_CHUNK = 1 << 22


class ShardWriter:
    """Writes the units of one file in their order. An error from fsync is raised and never retried."""

    def __init__(self, path: Path, shard: Shard, done: Sequence[Line], digest: hashlib._Hash, journal: Journal) -> None:
        """Go on after the units in `done`, whose bytes `digest` has seen."""
        self._shard, self._journal, self._digest = shard, journal, digest
        self._end = done[-1].end if done else 0
        self._synced = self._end
        self._finished: list[Line] = []
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, self._end)
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        self._syncing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "fsync")
        if not done:
            self.write(memoryview(shard.header))

    def write(self, data: memoryview) -> None:
        """Append bytes. Raises OSError."""
        self._digest.update(data)
        left = data
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._end += len(data)
        if self._end - self._synced >= SYNC_EVERY:
            self._wait()
            self._syncing = self._thread.submit(self._sync, self._taken())
            self._synced = self._end

    def finished(self, unit: str, kept: Kept | None) -> Line:
        """All bytes of a unit were written; its line, which the next fsync brings into the journal."""
        line = Line(self._shard.file, unit, self._end, self._digest.hexdigest(), kept)
        self._finished.append(line)
        return line

    def close(self) -> str:
        """Bring everything to the disk; the file's digest. Raises OSError."""
        try:
            self._wait()
            self._sync(self._taken())
        finally:
            self._shut()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Stop after an error, keeping what can be kept."""
        with contextlib.suppress(OSError):
            self._wait()
            self._sync(self._taken())
        self._shut()

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _taken(self) -> list[Line]:
        taken, self._finished = self._finished, []
        return taken

    def _sync(self, lines: list[Line]) -> None:
        os.fsync(self._descriptor)
        self._journal.append(lines)

    def _shut(self) -> None:
        self._thread.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def verified(path: Path, lines: Sequence[Line]) -> tuple[list[Line], hashlib._Hash]:
    """The leading lines whose digests the file still has, and the digest of it up to the last of them."""
    digest, good, at = hashlib.sha256(), [], 0
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        for line in lines:
            trial = digest.copy()
            while at < line.end and (data := file.read(min(_CHUNK, line.end - at))):
                trial.update(data)
                at += len(data)
            if at != line.end or trial.hexdigest() != line.sha256:
                break
            digest = trial
            good.append(line)
    return good, digest
