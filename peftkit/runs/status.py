"""Runs as their folders tell them: states, times and figures of finished, living, died and damaged ones."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import RunError
from peftkit.process import is_alive
from peftkit.runs.records import last_figures

_STATES = ("running", "done", "failed", "interrupted")


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """A run as its folder tells it; times are ISO 8601 in UTC."""

    id: str
    path: Path
    recipe: str
    state: Literal["running", "done", "failed", "interrupted", "died", "damaged"]
    started: str | None
    ended: str | None
    seconds: float | None
    error: str | None
    saved_as: str | None
    figures: dict[str, Any]
    lost_records: int = 0
    resumed: tuple[str, ...] = ()
    """When the run was gone on with."""
    pid: int | None = None
    """The process of a run in progress."""


def refuse_alive(status: RunStatus, what: str) -> None:
    """Raise RunError when a process still works on the run; `what` cannot be done to it then."""
    if status.state == "running":
        raise RunError(
            f"run {status.id} is still running, in process {status.pid}: it cannot be {what}",
            expected="a run whose process has ended",
            hint=f"let it finish, or stop it: kill {status.pid}  (it writes a checkpoint first)",
        )


def list_runs(root: Path) -> list[RunStatus]:
    """Every run in a folder, newest first; what cannot be read is listed as "damaged"."""
    runs = [load_folder(path) for path in _folders(Path(root))]
    return sorted(runs, key=lambda run: (run.started or "", run.id), reverse=True)


def load_run(root: Path, id_or_unique_prefix: str) -> RunStatus:
    """One run by its id or the beginning of it; raises RunError with near ids when none or several fit."""
    folders = {path.name: path for path in _folders(Path(root))}
    wanted = id_or_unique_prefix
    fits = [wanted] if wanted in folders else [name for name in folders if wanted and name.startswith(wanted)]
    if len(fits) == 1:
        return load_folder(folders[fits[0]])
    if fits:
        raise RunError(f"{len(fits)} runs begin with {wanted!r}: {', '.join(sorted(fits))}", hint="give more of the id")
    near = [name for name in folders if wanted and wanted in name]
    near = near or difflib.get_close_matches(wanted, folders, cutoff=0.4) or sorted(folders, reverse=True)[:3]
    raise RunError(
        f"no run {wanted!r} in {root}",
        expected=f"one of {', '.join(near)}" if near else "a run; there is none yet",
        hint="peftkit runs list",
    )


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"the folder of runs {root} cannot be read: {error.strerror or error}") from error


def load_folder(path: Path) -> RunStatus:
    """The run in one folder; one that cannot be read is "damaged", with the reason as its error."""
    try:
        facts = json.loads((path / "status.json").read_bytes())
        return _parsed(path, facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = "status.json is missing" if isinstance(error, FileNotFoundError) else f"status.json is unusable ({error})"
        return RunStatus(path.name, path, "", "damaged", _from_id(path.name), None, None, why, None, {})


def _parsed(path: Path, facts: Mapping[str, Any]) -> RunStatus:
    """status.json as a RunStatus; raises an error of Python's own for anything unexpected in it."""
    if facts["format"] != 1:
        raise ValueError(f"format {facts['format']!r}, this peftkit reads 1")
    state, ended, seconds = facts["state"], facts["ended"], facts["seconds"]
    started = datetime.fromisoformat(facts["started"])
    if state not in _STATES:
        raise ValueError(f"unknown state {state!r}")
    error = None if facts["error"] is None else str(facts["error"])
    figures = dict(facts["figures"] or {}) or last_figures(path)
    resumed = [datetime.fromisoformat(moment) for moment in facts.get("resumed", [])]
    if state == "running":
        last = datetime.now(UTC)
        if not is_alive(facts["process"]):
            state, last = "died", _last_sign(path)
            ended, error = stamp(last), "the process ended without a word (killed, out of memory, or power lost)"
        # The time of a resumed run is that of its processes, without the nights between them.
        seconds = float(seconds or 0.0) + max((last - max([started, *resumed])).total_seconds(), 0.0)
    saved_as = None if facts["saved_as"] is None else str(facts["saved_as"])
    return RunStatus(
        path.name, path, str(facts["recipe"]), state, stamp(started), None if ended is None else str(ended),
        None if seconds is None else float(seconds), error, saved_as, figures, int(facts.get("lost_records", 0)),
        tuple(stamp(moment) for moment in resumed), int(facts["process"]["pid"]) if state == "running" else None,
    )  # fmt: skip


def _last_sign(path: Path) -> datetime:
    names = ("status.json", "events.jsonl", "metrics.jsonl")
    return datetime.fromtimestamp(max((path / name).stat().st_mtime for name in names if (path / name).exists()), UTC)


def _from_id(name: str) -> str | None:
    with contextlib.suppress(ValueError):
        return stamp(datetime.strptime(name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC))
    return None


def stamp(moment: datetime) -> str:
    """A moment as ISO 8601 in UTC with milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
