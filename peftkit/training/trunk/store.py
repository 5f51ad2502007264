"""Trunk caches on disk: hidden states in one memory-mapped file each, found by what they were computed from.

    <cache>/trunk/<key>/states       states of the rows one after another, without padding, in the dtype they came in
    <cache>/trunk/<key>/trunk.json   what the key was made of, dtype, shape, size and SHA-256 of `states`
    <cache>/trunk/<key>.lock         held by the process that makes or removes it

A cache appears under its key when all of it is written, and is read whole and compared with its SHA-256 before it is
used. So nothing is fsynced: bytes that a power cut took are noticed, and everything can be made again. Hidden states
tell much about the rows they came from: only the user may read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from peftkit.canonical import digest_json, strict_json
from peftkit.durable import digest_file
from peftkit.errors import TrainingError
from peftkit.events import Report, Warned, silent

FORMAT = 1
_STATES, _HEAD = "states", "trunk.json"


@dataclass(frozen=True)
class Shape:
    """The array of one cache."""

    positions: int
    hidden: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return int(self.positions * self.hidden * self.dtype.itemsize)

    def as_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"positions": self.positions, "hidden": self.hidden, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Kept:
    """A cache that lies on the disk, whole or not."""

    path: Path
    bytes: int
    ingredients: Mapping[str, Any]
    """What its key was made of; empty where that cannot be read."""


class TrunkStore:
    """The trunk caches below one cache folder."""

    def __init__(self, cache: Path, report: Report = silent) -> None:
        self.root = cache / "trunk"
        self.report = report

    def path(self, ingredients: Mapping[str, Any]) -> Path:
        """The folder of the cache that was made of these."""
        return self.root / digest_json(ingredients)[:32]

    @contextlib.contextmanager
    def making(self, ingredients: Mapping[str, Any]) -> Iterator[None]:
        """Be the only process that makes this cache; what killed processes began is removed first."""
        self.root.mkdir(parents=True, exist_ok=True)
        os.chmod(self.root, 0o700)
        self._sweep()
        with FileLock(_lock(self.path(ingredients))):
            yield

    def load(self, ingredients: Mapping[str, Any], shape: Shape) -> torch.Tensor | None:
        """The states of shape (positions, hidden), mapped; None, and a warning, where the file is not what was written.

        Nothing is said where there is none.
        """
        folder = self.path(ingredients)
        if not folder.exists():
            return None
        try:
            _check(folder, ingredients, shape)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.report(Warned(f"the trunk cache {folder} is not what was written ({error}); it is made anew"))
            return None
        return self._mapped(folder, shape)

    def write(
        self, ingredients: Mapping[str, Any], shape: Shape, states: Iterator[torch.Tensor], spare: int = 0
    ) -> torch.Tensor:
        """Write the states of each row, of shape (length, hidden), and map them; an older cache gives way.

        Raises TrainingError when the disk has no room for them and for `spare` bytes more, the released trunk's, before
        the first is asked for where that is known.
        """
        folder = self.path(ingredients)
        draft = folder.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # its room is needed
        beside = " with the released trunk's weights beside it" if spare else ""
        require_room(self.root, shape.bytes + spare, f"the trunk cache{beside}")
        try:
            draft.mkdir(mode=0o700)
            digest = _write_states(draft / _STATES, shape, states)
            head = {"format": FORMAT, "ingredients": dict(ingredients), "size": shape.bytes, "sha256": digest}
            (draft / _HEAD).write_text(json.dumps({**head, **shape.as_record()}, indent=2) + "\n", encoding="utf-8")
            os.rename(draft, folder)
        except OSError as error:
            raise TrainingError(
                f"the trunk cache cannot be written: {error.strerror or error}",
                expected=f"room for {shape.bytes:,} bytes in {self.root}",
                hint="free some space, or name another folder with PEFTKIT_CACHE; or train.trunk_cache=false",
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return self._mapped(folder, shape)

    def kept(self) -> list[Kept]:
        """All caches, for a listing."""
        folders = sorted(path for path in self.root.glob("*") if path.is_dir()) if self.root.is_dir() else []
        return [Kept(path, sum(file.stat().st_size for file in path.iterdir()), _ingredients(path)) for path in folders]

    def remove(self) -> list[Kept]:
        """Remove all caches but those that are being made; a run that has one mapped goes on with it."""
        removed = []
        for kept in self.kept():
            with contextlib.suppress(Timeout), FileLock(_lock(kept.path), timeout=0):
                shutil.rmtree(kept.path, ignore_errors=True)
                _lock(kept.path).unlink(missing_ok=True)
                removed.append(kept)
        if self.root.is_dir():
            self._sweep()
        return removed

    def _sweep(self) -> None:
        for lock in self.root.glob("*.lock"):
            with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
                shutil.rmtree(lock.with_suffix(".new"), ignore_errors=True)

    def _mapped(self, folder: Path, shape: Shape) -> torch.Tensor:
        count = shape.positions * shape.hidden
        mapped = torch.from_file(str(folder / _STATES), shared=False, size=count, dtype=shape.dtype)
        return mapped.view(shape.positions, shape.hidden)


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise TrainingError when the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{what} takes {needed:,} bytes, and {folder} has {free:,} left",
            expected="room for it on the disk",
            hint="free some space, or name another folder with PEFTKIT_CACHE; or train.trunk_cache=false",
        )


def _write_states(path: Path, shape: Shape, states: Iterator[torch.Tensor]) -> str:
    digest, written = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for rows in states:
            data = memoryview(rows.contiguous().view(torch.uint8).numpy()).cast("B")
            digest.update(data)
            written += file.write(data)
    if written != shape.bytes:
        raise TrainingError(f"{written:,} bytes of states were computed", expected=f"{shape.bytes:,}")
    return digest.hexdigest()


def _check(folder: Path, ingredients: Mapping[str, Any], shape: Shape) -> None:
    head = strict_json((folder / _HEAD).read_bytes())
    expected = {"format": FORMAT, "ingredients": dict(ingredients), "size": shape.bytes, **shape.as_record()}
    for key, value in expected.items():
        if head[key] != value:
            raise ValueError(f"{_HEAD} says another {key}")
    size = (folder / _STATES).stat().st_size
    if size != shape.bytes:
        raise ValueError(f"{_STATES} has {size:,} bytes instead of {shape.bytes:,}")
    if digest_file(folder / _STATES) != head["sha256"]:
        raise ValueError(f"{_STATES} has other bytes")


def _ingredients(folder: Path) -> Mapping[str, Any]:
    try:
        found = strict_json((folder / _HEAD).read_bytes())["ingredients"]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _lock(folder: Path) -> Path:
    return folder.with_suffix(".lock")
