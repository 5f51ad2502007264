"""What a run's folder holds, apart from its records: files that may be missing or torn, and the disk they take."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.render import interval, number

CHECKPOINTS, TRAINER = "checkpoints", "trainer"
UNPUBLISHED, INTERRUPTED = "adapter", "interrupted"
"""Where a run keeps its trained adapter until the registry has it, and what an interrupted one had learned."""
LEARNED = (UNPUBLISHED, INTERRUPTED)
"""Where a trained adapter lies until the registry has it, and what an interrupted run had learned."""

_LARGEST_FILE = 32 << 20  # bytes; what a run writes about itself is a thousand times smaller


@dataclass(frozen=True)
class Held:
    """Bytes that a run's files take."""

    total: int
    checkpoints: int


def held(run: Path) -> Held:
    """The disk that a run holds; links are not followed."""
    return Held(size_of(run), size_of(run / CHECKPOINTS))


def size_of(path: Path) -> int:
    """Bytes of the plain files in and below a path; 0 for what is not there, or a link."""
    total = 0
    with contextlib.suppress(OSError):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(path) as entries:
                for entry in entries:
                    total += size_of(Path(entry.path))
    return total


def checkpoint_steps(run: Path) -> list[int]:
    """The steps that a run has a checkpoint of, oldest first."""
    with contextlib.suppress(OSError):
        names = [path.name.removeprefix("step-") for path in (run / CHECKPOINTS).glob("step-*")]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())
    return []


def learned(run: Path) -> list[str]:
    """The parts of a run's folder that hold what it learned, by name."""
    found = [name for name in LEARNED if (run / name).is_dir() and any((run / name).iterdir())]
    return [*found, CHECKPOINTS] if checkpoint_steps(run) else found


def read_json(run: Path, name: str) -> tuple[Any, str | None]:
    """A JSON file of a run, or None and why there is none."""
    text, why = read_text(run, name)
    if why:
        return None, why
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, f"{name} is torn or no JSON ({error})"


def read_text(run: Path, name: str) -> tuple[str, str | None]:
    """A text file of a run, or "" and why there is none."""
    try:
        if (run / name).stat().st_size > _LARGEST_FILE:
            return "", f"{name} is larger than {_LARGEST_FILE >> 20} MiB and is not shown"
        return (run / name).read_bytes().decode("utf-8", "replace"), None
    except FileNotFoundError:
        return "", f"there is no {name}"
    except OSError as error:
        return "", f"{name} cannot be read ({error.strerror or error})"


def flat_figures(figures: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested figures as (dotted name, value); an interval, {point, low, high}, stays one value."""
    if isinstance(figures, Mapping) and not is_interval(figures):
        for name, value in figures.items():
            yield from flat_figures(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, figures


def is_interval(value: Any) -> bool:
    """Whether a figure is a number with its confidence interval."""
    return isinstance(value, Mapping) and "point" in value and set(value) <= {"point", "low", "high"}


def as_text(value: Any) -> Any:
    """A figure as a cell shows it: an interval as text, a number as it is, text and lists as text."""
    if is_interval(value):
        point, low, high = (value.get(name) for name in ("point", "low", "high"))
        if not all(_is_number(end) for end in (point, low, high)):
            return number(point) if _is_number(point) else str(point)
        return interval(point, low, high)
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
