"""Removing runs, and what finished ones no longer need: out of sight as one step, then deleted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from peftkit.durable import sync_folder
from peftkit.errors import RunError
from peftkit.process import is_alive
from peftkit.runs.contents import CHECKPOINTS, TRAINER, checkpoint_steps, learned, size_of
from peftkit.runs.lock import hold
from peftkit.runs.status import RunStatus, list_runs, load_folder, load_run, refuse_alive

_HIDDEN = re.compile(r"\..+\.(?P<kind>new|removed)")
_ABANDONED = 3600.0
"""Seconds after which a draft that does not name its process counts as left behind; filling one takes milliseconds."""


@dataclass(frozen=True)
class Removed:
    """What was removed, or would be: paths below the folder of runs with their bytes, and what was left and why."""

    paths: tuple[tuple[str, int], ...]
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes freed."""
        return sum(size for _, size in self.paths)


def remove_runs(root: Path, wanted: Sequence[str], *, force: bool = False) -> Removed:
    """Remove whole runs, named by their ids or unique beginnings; all are looked at before the first is removed.

    Raises RunError for a run in progress, a folder that is no run or a link, and, without `force`, for one that is the
    only place of what it learned.
    """
    root = Path(root)
    runs = {status.id: status for status in (load_run(root, name) for name in wanted)}
    for status in runs.values():
        _check_removable(status, force)
    removed = []
    for status in runs.values():
        lock = hold(status.path)  # against a resume at the same moment
        try:
            status = load_folder(status.path)  # and one that began since the first look
            _check_removable(status, force)
            removed.append((status.id, size_of(status.path)))
            hidden = _hide(status.path, root)
        finally:
            lock.release()
        _delete(hidden)
    return Removed(tuple(removed))


def collect(
    root: Path, *, older_than: timedelta | None = None, dry_run: bool = False, now: datetime | None = None
) -> Removed:
    """Remove what no run needs any more; records (settings, figures, events, samples) are always kept.

    That is: checkpoints and trainer files of runs that are done and in the registry, trainer files of runs that have no
    checkpoint to go on from, and what processes that died left half made or half removed. With `older_than` also the
    checkpoints of runs that could be resumed, but ended that long ago.
    """
    sweep = _Sweep(Path(root), dry_run)
    moment = now or datetime.now(UTC)
    for path in _hidden(sweep.root):
        if _is_left_behind(path):
            sweep.take(path)
    for status in list_runs(sweep.root):
        if status.state == "running" or status.path.is_symlink() or not is_run(status.path):
            continue
        sweep.take_from(status, _unneeded(status, older_than, moment))
    return Removed(tuple(sweep.taken), tuple(sweep.kept))


def is_run(path: Path) -> bool:
    """Whether a folder holds what only a run writes; data and notes may lie beside the runs."""
    return (path / "status.json").is_file() or all((path / n).is_file() for n in ("config.yaml", "environment.json"))


def _check_removable(status: RunStatus, force: bool) -> None:
    path = status.path
    if path.is_symlink():
        raise RunError(
            f"{path} is a symbolic link to {os.readlink(path)}",
            expected="a run's own folder in the folder of runs",
            hint=f"remove the link: rm {path}",
        )
    if not is_run(path):
        raise RunError(f"{path} is no run: it has no status.json", expected="a folder that a run wrote",
                       hint=f"if nobody needs it: rm -r {path}")  # fmt: skip
    refuse_alive(status, "removed")
    for part in learned(path) if status.saved_as is None and not force else []:
        steps = checkpoint_steps(path)
        again = f"go on with it: peftkit train --resume {status.id}; " if steps else ""
        raise RunError(
            f"run {status.id} is the only place of what it learned: {path / part}, {status.state}, not in the registry",
            expected="a run that was saved, or that learned nothing",
            hint=f"{again}or remove it for good: peftkit runs rm {status.id} --force",
        )


def _unneeded(status: RunStatus, older_than: timedelta | None, now: datetime) -> Iterator[Path]:
    """The parts of an ended run that it does not need."""
    published = status.state == "done" and status.saved_as is not None
    steps = checkpoint_steps(status.path)
    old = older_than is not None and _age(status, now) > older_than
    if published or old:
        yield status.path / CHECKPOINTS
    if published or old or not steps:
        yield status.path / TRAINER
    yield from (path for path in _hidden(status.path) if path.name.endswith((".new", ".removed")))


def _age(status: RunStatus, now: datetime) -> timedelta:
    with contextlib.suppress(TypeError, ValueError):
        return now - datetime.fromisoformat(str(status.ended or status.started))
    return timedelta(0)


@dataclass
class _Sweep:
    root: Path
    dry_run: bool
    taken: list[tuple[str, int]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)

    def take_from(self, status: RunStatus, paths: Iterator[Path]) -> None:
        """Remove parts of one run, unless another process is at it."""
        found = [path for path in paths if path.is_symlink() or path.exists()]
        if not found:
            return
        with contextlib.ExitStack() as stack:
            if not self.dry_run:  # which leaves nothing behind, not even a lock
                try:
                    stack.callback(hold(status.path).release)
                    refuse_alive(load_folder(status.path), "cleaned")
                except RunError as error:
                    self.kept.append((status.id, error.fact))
                    return
            for path in found:
                self.take(path)

    def take(self, path: Path) -> None:
        """Remove a file or a folder; a link is left, for what it leads to is not ours."""
        name = str(path.relative_to(self.root))
        if path.is_symlink():
            self.kept.append((name, f"is a symbolic link to {os.readlink(path)}"))
            return
        size = size_of(path)
        if not self.dry_run:
            try:
                _delete(path if path.name.endswith(".removed") else _hide(path, path.parent))
            except RunError as error:
                self.kept.append((name, error.fact))
                return
            except FileNotFoundError:  # another gc was here
                return
        self.taken.append((name, size))


def _hidden(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if _HIDDEN.fullmatch(path.name))
    return []


def _is_left_behind(path: Path) -> bool:
    """Whether the process that made a draft is gone; what was being removed may be removed by anybody."""
    if path.name.endswith(".removed"):
        return True
    try:
        return not is_alive(json.loads((path / "status.json").read_bytes())["process"])
    except (OSError, ValueError, TypeError, KeyError):
        with contextlib.suppress(OSError):
            return time.time() - path.lstat().st_mtime > _ABANDONED
        return False


def _hide(path: Path, folder: Path) -> Path:
    """Take a path out of sight as one step; a crash after it leaves only what `collect` removes."""
    hidden = folder / f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.removed"
    try:
        path.rename(hidden)
        sync_folder(folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{path} cannot be removed: {error.strerror or error}",
                       expected="a folder that can be written") from error  # fmt: skip
    return hidden


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:  # another process removes the same leftover
        pass
    except OSError as error:
        raise RunError(
            f"{path} could not be deleted as a whole: {error.strerror or error}",
            expected="files that can be deleted",
            hint="mend its permissions, then: peftkit runs gc",
        ) from error
