"""What a run keeps in its folder besides: a full disk costs such a file, and not the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import RunError
from peftkit.events import Report, Warned
from peftkit.runs import RunFolder

if TYPE_CHECKING:
    from peftkit.tuning.tuned import Tuned


def keep_json(folder: RunFolder, name: str, value: Any, report: Report) -> None:
    """Write a file that nothing depends on."""
    try:
        folder.write_json(name, value)
    except RunError as error:
        report(Warned(error.fact, error.hint))


def keep_adapter(tuned: Tuned, target: Path, report: Report) -> Path | None:
    """Write the adapter as it is; None, and a warning, where it finds no room: the registry's disk may have some."""
    from safetensors import SafetensorError

    from peftkit.tuning.inject import save_adapter

    try:
        return save_adapter(tuned, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(target, ignore_errors=True)
        report(Warned(f"the adapter could not be kept in {target}: {error}", "free some space on that disk"))
        return None


def described(folder: Path) -> str:
    """What lies in the folder of a kept adapter, in words, and how the registry takes it over."""
    if (folder / "tensors.safetensors").exists():
        return f"trained tensors in {folder}, which peftkit import takes with --base"
    return f"a PEFT checkpoint in {folder}"


def needed(payload: Path | None) -> Path:
    """The adapter's folder, where it must be there. Raises RunError when it found no room."""
    if payload is None:
        raise RunError("the adapter could not be written", hint="free some space in the folder of runs")
    return payload
