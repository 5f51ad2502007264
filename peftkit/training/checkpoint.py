"""Checkpoints of a run: all it needs to go on from a step as if it had never stopped.

    checkpoints/step-00000012/
      state.safetensors   trained tensors, optimizer states, random states
      state.json          the rest: figures so far, scheduler, what the run is bound to
      checkpoint.json     format, step, size and SHA-256 of the other two

A checkpoint appears under its name when all of it is on the disk, and is checked byte by byte when it is loaded. One
that cannot be written leaves the older ones as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from peftkit.canonical import strict_json
from peftkit.durable import delete, digest_file, make_folder, move_folder, remove, sync_folder, write_file
from peftkit.errors import RunError
from peftkit.events import Report, Warned, silent
from peftkit.training.flat import flatten, unflatten

FORMAT = 2
_FILES = ("state.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked."""

    step: int
    path: Path
    state: Any
    """What `Checkpoints.write` was given, tensors on the CPU."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, report: Report = silent) -> None:
        self.folder = folder
        self.report = report

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        names = [path.name for path in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def write(self, step: int, state: Mapping[str, Any]) -> Path:
        """Keep `state` (nested, with tensors) as the checkpoint of `step`, in the place of one that has this step.

        Raises OSError when it cannot be written; the checkpoints of other steps are still there.
        """
        plain, tensors = flatten(state)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        make_folder(self.folder)
        self._clear_drafts()
        target = self.path(step)
        draft = self.folder / f".{target.name}.new"
        try:
            make_folder(draft)
            files = {"state.safetensors": safetensors.torch.save(tensors), "state.json": _json(plain)}
            for name, data in files.items():
                write_file(draft / name, data)
            digests = {name: {"size": len(data), "sha256": _digest(data)} for name, data in files.items()}
            write_file(draft / "checkpoint.json", _json({"format": FORMAT, "step": step, "files": digests}))
            sync_folder(draft)
            if target.exists():
                remove(target, self.folder)
            move_folder(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return target

    def retain(self, last: int, best: int | None) -> None:
        """Remove all checkpoints but the `last` newest and that of the step `best`."""
        for step in self.steps()[:-last]:
            if step != best:
                remove(self.path(step), self.folder)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps: damaged ones that were passed over, when a run goes on from `step`."""
        for later in self.steps():
            if later > step:
                remove(self.path(later), self.folder)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are right; damaged ones are reported and passed over."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except RunError as error:
                self.report(Warned(f"{error.fact}; it is passed over"))
        return None

    def load(self, step: int) -> Checkpoint:
        """Read and check one checkpoint; raises RunError naming the file that is not what was written."""
        path = self.path(step)
        try:
            head = strict_json((path / "checkpoint.json").read_bytes())
            if head["format"] != FORMAT:
                raise RunError(
                    f"the checkpoint {path} has format {head['format']!r}",
                    expected=f"format {FORMAT}",
                    hint="resume it with the peftkit that wrote it",
                )
            for name in _FILES:
                _check(path / name, head["files"][name])
            tensors = safetensors.torch.load_file(path / "state.safetensors")
            return Checkpoint(step, path, unflatten(json.loads((path / "state.json").read_bytes()), tensors))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RunError(f"the checkpoint {path} cannot be read: {error}", hint="remove it") from error

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def _clear_drafts(self) -> None:
        """What a killed writer or remover left behind; nobody reads it, and a full disk needs the room."""
        for leftover in [*self.folder.glob(".step-*.new"), *self.folder.glob("removed-*")]:
            delete(leftover)


def _check(path: Path, promised: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != promised["size"] or digest_file(path) != promised["sha256"]:
        found = f"has {size:,} bytes instead of {promised['size']:,}" if size != promised["size"] else "has other bytes"
        raise RunError(f"the checkpoint file {path} {found}", expected="what was written", hint="remove its folder")


def _json(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=True) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
