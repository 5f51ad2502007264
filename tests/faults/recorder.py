"""What the registry does to the disk, call by call: recorded, and made to fail or to stop at a chosen call.

The calls of `os` that change a disk are wrapped while an operation runs. A change by any other way is not missed: the
recorded changes, replayed, must give the folder that is really there (`Recorder.check`).
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.disk import TOP, Disk, Event, Slot, Tree

CHANGES = ("open", "write", "fsync", "mkdir", "rename", "link", "unlink", "rmdir")
_STORE = (f"{os.sep}peftkit{os.sep}registry{os.sep}", f"{os.sep}peftkit{os.sep}durable.py")
_TRUE: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in (*CHANGES, "replace", "fchmod")}


_STREAM = open


class Killed(BaseException):
    """The process is gone: nothing that it would have tidied up is tidied up."""


Fault = Callable[[int, str, str], None]
"""Called before each call that changes the disk, with its number (from 1), its kind and its path; it may raise."""


class Recorder:
    """The changes below `top`, which holds what `disk` holds."""

    def __init__(self, top: Path, disk: Disk, fault: Fault | None = None) -> None:
        self.top = top
        self.disk = disk.copy()
        self.events: list[Event] = []
        self.calls: list[str] = []
        self._fault = fault
        self._dead = False
        self._failed: set[int | None] = set()
        self._inodes = {_key(os.stat(top)): TOP}
        for path, inode in self.disk.live().items():
            self._inodes[_key(os.lstat(top / path))] = inode

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record what this process does."""
        for name in CHANGES:
            setattr(os, name, getattr(self, f"_{name}"))
        os.replace = self._rename  # type: ignore[assignment]
        builtins.open = self._stream  # type: ignore[assignment]
        try:
            yield self
        finally:
            for name in (*CHANGES, "replace"):
                setattr(os, name, _TRUE[name])
            builtins.open = _STREAM

    def check(self) -> None:
        """Nothing changed the disk unseen. Raises AssertionError."""
        real = read_tree(self.top)
        model = self.disk.tree()
        assert real == model, f"changed unseen: {sorted(real.items() ^ model.items())[:4]}"

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self.disk.feed(event)

    def _call(self, kind: str, path: object) -> None:
        if self._dead:
            raise Killed
        self.calls.append(kind)
        if self._fault is not None:
            try:
                self._fault(len(self.calls), kind, str(path))
            except Killed:
                self._dead = True
                raise

    def _slot(self, path: Any, dir_fd: int | None = None) -> Slot | None:
        """Where `path` has its entry; None outside of the top, and for the lock and the index, which are no state."""
        folder, name = os.path.split(os.fspath(path))
        if name == ".lock" or name.startswith("index.sqlite"):
            return None
        try:
            found = os.fstat(dir_fd) if dir_fd is not None else os.stat(folder or ".")
        except OSError:
            return None  # the call itself will say so
        inode = self._inodes.get(_key(found))
        return None if inode is None else (inode, name)

    def _named(self, path: Any, dir_fd: int | None = None) -> int:
        return self._inodes[_key(os.stat(path, dir_fd=dir_fd, follow_symlinks=False))]

    def _new(self, path: Any) -> int:
        self._inodes[_key(os.lstat(path))] = number = self.disk.new()
        return number

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        slot = self._slot(path) if flags & os.O_CREAT else None
        if flags & os.O_CREAT and os.path.basename(path) == ".lock":
            self._call("open", path)  # can fail; what it does is no state
        if slot is None:
            return _TRUE["open"](path, flags, mode, dir_fd=dir_fd)  # type: ignore[no-any-return]
        self._call("open", path)
        there = os.path.lexists(path)
        assert not (there and flags & os.O_TRUNC), f"{path} is written over, which the model does not know"
        found: int = _TRUE["open"](path, flags, mode)
        if not there:
            self._add(Event("create", self._new(path), (slot,)))
        return found

    def _stream(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        """What `open` opens for writing by its path, written through `os.write`."""
        if isinstance(file, int) or "r" in mode or self._slot(file) is None:
            return _STREAM(file, mode, *rest, **options)
        assert mode == "xb", f"{file} is opened with {mode!r}, which the model does not know"
        descriptor = self._open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        return io.BufferedWriter(_Raw(descriptor, "wb"))

    def _write(self, descriptor: int, data: Any) -> int:
        inode = self._inodes.get(_key(os.fstat(descriptor)))
        if inode is None:
            return _TRUE["write"](descriptor, data)  # type: ignore[no-any-return]
        self._call("write", f"descriptor {descriptor}")
        written: int = _TRUE["write"](descriptor, data)
        self._add(Event("write", inode, data=bytes(data[:written])))
        return written

    def _fsync(self, descriptor: int) -> None:
        inode = self._inodes.get(_key(os.fstat(descriptor)))
        assert inode not in self._failed, "an fsync that failed is tried again"
        try:
            self._call("fsync", f"descriptor {descriptor}")
        except OSError:
            self._failed.add(inode)
            raise
        _TRUE["fsync"](descriptor)
        if inode is not None:
            self._add(Event("fsync", inode, sites=_sites()))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        assert dir_fd is None
        slot = self._slot(path)
        if slot is not None:
            self._call("mkdir", path)
        _TRUE["mkdir"](path, mode)
        if slot is not None:
            self._add(Event("mkdir", self._new(path), (slot,)))

    def _link(self, source: Any, target: Any, **options: Any) -> None:
        slot = self._slot(target)
        assert slot is not None
        self._call("link", target)
        inode = self._named(source)
        _TRUE["link"](source, target, **options)
        self._add(Event("link", inode, (slot,)))

    def _rename(self, source: Any, target: Any, **options: Any) -> None:
        slots = (self._slot(source), self._slot(target))
        if slots == (None, None):
            _TRUE["rename"](source, target, **options)
            return
        assert slots[0] is not None
        assert slots[1] is not None
        self._call("rename", target)
        inode = self._named(source)
        _TRUE["rename"](source, target, **options)
        self._add(Event("rename", inode, (slots[0], slots[1])))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone("rmdir", path, dir_fd)

    def _gone(self, kind: str, path: Any, dir_fd: int | None) -> None:
        slot = self._slot(path, dir_fd)
        if slot is None:
            _TRUE[kind](path, dir_fd=dir_fd)
            return
        self._call(kind, path)
        inode = self._named(path, dir_fd)
        _TRUE[kind](path, dir_fd=dir_fd)
        self._add(Event(kind, inode, (slot,)))


class _Raw(io.FileIO):
    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)


def read_tree(top: Path) -> Tree:
    """What is below `top`, without the lock and the index."""
    tree: Tree = {}
    for folder, folders, files in os.walk(top):
        where = Path(folder).relative_to(top)
        tree.update({(where / name).as_posix(): None for name in folders})
        wanted = (name for name in files if name != ".lock" and not name.startswith("index.sqlite"))
        tree.update({(where / name).as_posix(): Path(folder, name).read_bytes() for name in wanted})
    return tree


def write_tree(top: Path, tree: Tree) -> None:
    """Put `tree` below the new folder `top`."""
    _TRUE["mkdir"](top)
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            _TRUE["mkdir"](top / path)
            continue
        descriptor = _TRUE["open"](top / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        _TRUE["write"](descriptor, data)
        os.close(descriptor)


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _sites() -> tuple[str, ...]:
    """The lines of the registry's code that are running, as `file:line`."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _STORE):
            found.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
