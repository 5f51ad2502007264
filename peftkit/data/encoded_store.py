"""What was made of rows, on disk: found by what it was made from, checked before it is used, bounded in size.

    <cache>/encoded/<key>/entry.json   what the key was made of, small facts, size and SHA-256 of the files beside it
    <cache>/encoded/<key>/rows.arrow   encoded rows (peftkit/data/encoded.py); not in every entry
    <cache>/encoded/.<key>.<random>/   an entry that is being written; `lock` in it is held by the writer
    <cache>/encoded/.lock              held for moments: while a draft is begun, published, or what is old is removed

An entry is fsynced before one rename publishes it, so a kill at any point leaves it whole or not there. Of two
processes that write the same entry, the first wins and the second's draft goes away. Rows are private: only the user
may read them, and only what the user alone can have written is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftkit.data.encoded import MANY
from peftkit.durable import digest_file, sync_folder
from peftkit.events import Report, Warned, silent

FORMAT = 1
LIMIT = 8 << 30
"""Bytes that all entries together may have: about a billion tokens at 8 bytes each."""
_ENTRY, _LOCK = "entry.json", "lock"
_PATIENCE = 10.0  # seconds; the store's lock is held for moments
# What the content of an entry can raise. A file is missing only by damage: entries appear whole, and go in one step.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileNotFoundError)


@dataclass(frozen=True)
class Entry:
    """One entry that is as it was written."""

    folder: Path
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """One entry that lies on the disk, whole or not."""

    path: Path
    bytes: int
    used: float
    """When it was last written or read, in seconds since the epoch."""


class EncodedStore:
    """The entries below one cache folder."""

    def __init__(self, cache: Path, report: Report = silent, *, limit: int = LIMIT, many: int = MANY) -> None:
        self.root = cache / "encoded"
        self.report = report
        self.limit = limit
        self.many = many
        """Tokens from which encoded rows are kept."""
        self._told = False

    def path(self, ingredients: Mapping[str, Any]) -> Path:
        """The folder of the entry that was made of these."""
        return self.root / _digest({"format": FORMAT, "ingredients": ingredients})[:32]

    def load(self, ingredients: Mapping[str, Any]) -> Entry | None:
        """The entry, with all its files compared with their digests; None where there is none.

        One that is not what was written is told and removed, and None too: who writes it anew replaces it. So is one
        that cannot be read, or that another user can have written, but these stay where they are.
        """
        folder = self.path(ingredients)
        try:
            if not folder.is_dir() or self._foreign(self.root, folder):
                return None
            entry = _checked(folder, ingredients)
        except _DAMAGED as error:
            return self._again(folder, ingredients, error)
        except OSError as error:
            reason = error.strerror or error
            fact = f"the encoded rows {folder} cannot be read: {reason}"
            self._tell(fact, "`peftkit runs gc --encoded` removes them")
            return None
        with contextlib.suppress(OSError):  # a cache that is read-only serves as it is
            os.utime(folder / _ENTRY)
        return entry

    def _again(self, folder: Path, ingredients: Mapping[str, Any], error: Exception) -> Entry | None:
        """Look at what was damaged once more while no other process changes it, and remove it if it still is."""
        with contextlib.suppress(OSError, Timeout):
            if not folder.is_dir():  # another process made room
                return None
            with self._locked():
                try:
                    return _checked(folder, ingredients)
                except _DAMAGED:
                    if not folder.is_dir():
                        return None
                    self._drop(folder)
        self.report(Warned(f"the encoded rows {folder} are not what was written ({error}); they are made anew"))
        return None

    def _foreign(self, *folders: Path) -> bool:
        """Whether another user can have written into one of these; that is told."""
        reason = next((f"{folder} {why}" for folder in folders if (why := writable_by_others(folder))), None)
        if reason:
            mend = "remove it, set PEFTKIT_CACHE to a folder of yours, or set data.cache=false"
            self._tell(f"encoded rows are neither taken from the cache nor kept: {reason}", mend)
        return reason is not None

    def _tell(self, fact: str, mend: str) -> None:
        """Warn that the cache is of no use, once: an audit asks it for several entries."""
        if not self._told:
            self._told = True
            self.report(Warned(f"{fact}; the next run encodes them again", mend))

    def save(
        self, ingredients: Mapping[str, Any], facts: Mapping[str, Any], write: Callable[[Path], None] | None = None
    ) -> Entry | None:
        """Keep an entry; `write` puts its files into the folder it is given. Older entries give way to the limit.

        None, and a warning, where the disk does not take it: what was made is in memory all the same.
        """
        folder = self.path(ingredients)
        try:
            if not self._own_root():
                return None
            with self._draft(folder) as draft:
                if write is not None:
                    write(draft)
                files = {path.name: _described(path) for path in sorted(draft.iterdir()) if path.name != _LOCK}
                head = {"format": FORMAT, "ingredients": ingredients, "facts": facts, "files": files}
                _write_synced(draft / _ENTRY, _canonical({**head, "sha256": _digest(head)}))
                sync_folder(draft)
                with self._locked():
                    if not folder.is_dir():
                        os.rename(draft, folder)
                    (folder / _LOCK).unlink(missing_ok=True)
                    sync_folder(self.root)
                    self._make_room(folder)
            return Entry(folder, facts)
        except (OSError, Timeout, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            mend = "free some space, set PEFTKIT_CACHE, or set data.cache=false"
            self._tell(f"encoded rows cannot be kept in {self.root}: {reason}", mend)
            return None

    def kept(self) -> list[Kept]:
        """All entries, the one that was used longest ago first."""
        found = [_kept(path) for path in self._folders() if not path.name.startswith(".")]
        return sorted(found, key=lambda kept: (kept.used, kept.path.name))

    def remove(self) -> list[Kept]:
        """Remove all entries, and what killed processes left; a run that has one mapped goes on with it."""
        if not self.root.is_dir():
            return []
        with self._locked():
            removed = self.kept()
            for kept in removed:
                self._drop(kept.path)
            self._sweep()
        return removed

    def _folders(self) -> list[Path]:
        return [path for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.root / ".lock", timeout=_PATIENCE):
            yield

    def _own_root(self) -> bool:
        """Make the root, which only the user may read; False where that is not to be had."""
        self.root.mkdir(0o700, parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # another's: told below
            if not _of_another(self.root.stat()):
                os.chmod(self.root, 0o700)
        return not self._foreign(self.root)

    @contextlib.contextmanager
    def _draft(self, folder: Path) -> Iterator[Path]:
        """A folder to write into, which no other process takes for a dead one's; what is left of it goes away."""
        draft = self.root / f".{folder.name}.{secrets.token_hex(4)}"
        with self._locked():
            self._sweep()
            draft.mkdir(mode=0o700)
            alive = FileLock(draft / _LOCK)
            alive.acquire(timeout=0)
        try:
            yield draft
        finally:
            alive.release(force=True)
            shutil.rmtree(draft, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove the drafts of processes that are no more; the store's lock is held."""
        for path in self._folders():
            if path.name.startswith("."):
                with contextlib.suppress(Timeout, OSError):
                    with FileLock(path / _LOCK, timeout=0):
                        pass
                    shutil.rmtree(path, ignore_errors=True)

    def _drop(self, folder: Path) -> None:
        """Take an entry out of sight as one step, then delete it; the store's lock is held."""
        leaving = self.root / f".{folder.name}.{secrets.token_hex(4)}"
        os.rename(folder, leaving)
        shutil.rmtree(leaving, ignore_errors=True)

    def _make_room(self, newest: Path) -> None:
        entries = self.kept()
        total = sum(kept.bytes for kept in entries)
        for kept in entries:
            if total > self.limit and kept.path != newest:
                self._drop(kept.path)
                total -= kept.bytes


def writable_by_others(folder: Path) -> str | None:
    """Why another user can have written into a folder; None where only this one and root could.

    Raises OSError where there is none.
    """
    found = folder.stat()
    if _of_another(found):
        return f"belongs to user {found.st_uid}"
    mode = stat.S_IMODE(found.st_mode)
    return f"can be written by others (mode {mode:o})" if mode & 0o022 and os.name == "posix" else None


def _of_another(found: os.stat_result) -> bool:
    return hasattr(os, "getuid") and found.st_uid != os.getuid()


def _checked(folder: Path, ingredients: Mapping[str, Any]) -> Entry:
    head = json.loads((folder / _ENTRY).read_bytes())
    told = head.pop("sha256")
    if told != _digest(head):
        raise ValueError(f"{_ENTRY} has other bytes")
    if head["format"] != FORMAT or _canonical(head["ingredients"]) != _canonical(ingredients):
        raise ValueError(f"{_ENTRY} is of other rows")
    for name, file in head["files"].items():
        size = (folder / name).stat().st_size
        if size != file["size"]:
            raise ValueError(f"{name} has {size:,} bytes instead of {file['size']:,}")
        if digest_file(folder / name) != file["sha256"]:
            raise ValueError(f"{name} has other bytes")
    return Entry(folder, head["facts"])


def _described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest_file(path)}


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _kept(path: Path) -> Kept:
    sizes, used = 0, 0.0
    with contextlib.suppress(OSError):
        used = path.stat().st_mtime
        sizes = sum(file.stat().st_size for file in path.iterdir())
        used = (path / _ENTRY).stat().st_mtime
    return Kept(path, sizes, used)


def _canonical(value: Any) -> bytes:
    """One spelling, in ASCII: halves of a character, which a row may hold, come back as they were."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()
