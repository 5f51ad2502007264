"""One execution of a recipe: its folder, id, environment, events, metrics and status.

    <id>/config.yaml environment.json      written before the folder appears under its name
         status.json                       state, process and result; replaced as a whole
         events.jsonl metrics.jsonl        appended line by line; a killed process may leave the last line torn

A process that was killed cannot say so. status.json therefore names the process (pid, start time, boot, host), and a
run that claims to be running while that process is gone is shown as "died".
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from peftkit.atomic import replace_file, sync_folder
from peftkit.config import dump_yaml
from peftkit.errors import RunError
from peftkit.events import Event, Warned, silent
from peftkit.plain import as_json_text, as_plain
from peftkit.process import identity, is_alive

_STATES = ("running", "done", "failed", "interrupted")


class RunFolder:
    """The folder of a run in progress."""

    def __init__(self, path: Path, status: Mapping[str, Any]) -> None:
        self.path = path
        self.id = path.name
        self.lost = 0
        """Events and metrics that could not be written."""
        self.notify: Callable[[Event], None] = silent
        """Told once, by a Warned, when the first line is lost."""
        self._status = dict(status)
        self._clock = time.monotonic()
        self._torn: set[str] = set()

    @classmethod
    def create(cls, root: Path, recipe: str, config: Mapping[str, Any], environment: Mapping[str, str]) -> RunFolder:
        """Make `<root>/<UTC time>-<recipe>-<random>` with its first files; raises RunError when it cannot be."""
        root = Path(root)
        started = datetime.now(UTC)
        name = re.sub(r"[^A-Za-z0-9_]+", "-", Path(recipe).name.removesuffix(".py")).strip("-")[:60] or "run"
        status = {
            "format": 1, "recipe": recipe, "state": "running", "started": _stamp(started), "ended": None,
            "seconds": None, "error": None, "saved_as": None, "figures": {}, "process": identity(os.getpid()),
        }  # fmt: skip
        try:
            root.mkdir(parents=True, exist_ok=True)
            while True:
                path = root / f"{started:%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"
                # Filled under a hidden name and renamed, so that nobody sees a run without its status. A rename onto
                # a folder that holds files fails, so no run can take the place of another.
                draft = root / f".{path.name}.new"
                with contextlib.suppress(FileExistsError):
                    draft.mkdir()
                    if not path.exists():
                        break
                    draft.rmdir()
            try:
                replace_file(draft / "config.yaml", dump_yaml(as_plain(config)))
                replace_file(draft / "environment.json", as_json_text(environment))
                replace_file(draft / "status.json", as_json_text(status))
                draft.rename(path)
                sync_folder(root)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        except OSError as error:
            raise RunError(
                f"no run folder can be made in {root}: {error.strerror or error}",
                expected="a folder that can be written, with free space",
                hint="free some space, or choose another folder with --runs or PEFTKIT_RUNS",
            ) from error
        return cls(path, status)

    def record(self, event: Event) -> None:
        """Append an event to events.jsonl; never raises for a full disk (see `lost`)."""
        self._append("events.jsonl", {"at": _stamp(datetime.now(UTC)), **event.as_record()})

    def log_metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Append figures to metrics.jsonl, NaN and infinities as text; never raises for a full disk (see `lost`)."""
        seconds = round(time.monotonic() - self._clock, 3)
        self._append("metrics.jsonl", {"step": step, "seconds": seconds, "figures": dict(figures)})

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file atomically; raises RunError when it cannot be written."""
        return self.write_text(name, as_json_text(value))

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically; raises RunError when it cannot be written or lies outside the folder."""
        target = self.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or target == self.path:
            raise RunError(f"{name!r} is not a file name inside the run folder {self.path}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, text)
        except OSError as error:
            raise RunError(
                f"{target} cannot be written: {error.strerror or error}", hint="free some space in the folder of runs"
            ) from error
        return target

    def finish(self, state: Literal["done", "failed", "interrupted"], **facts: Any) -> None:
        """Write the end of the run to status.json (error=, saved_as=, figures=, …); raises RunError if it cannot."""
        seconds = round(time.monotonic() - self._clock, 3)
        end = {"state": state, "ended": _stamp(datetime.now(UTC)), "seconds": seconds, "lost_records": self.lost}
        self._status.update({**facts, **end})
        self.write_json("status.json", self._status)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line.

        A disk that fills up at step 4,000 must not cost the 4,000 steps: what fails is only the diary. So a line that
        cannot be written is counted, `notify` hears of the first one, the count goes into status.json, and the adapter
        itself is still saved, or fails, by its own error. Raising once would kill every caller that does not expect it.
        """
        line = (json.dumps(as_plain(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        # After a torn line the next one starts afresh, or both would be unreadable.
        data = b"\n" + line if name in self._torn else line
        written = 0
        try:
            # Opened each time and unbuffered: the line is with the kernel when this returns, so kill -9 loses nothing.
            handle = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(handle, data)
            finally:
                os.close(handle)
            if written < len(data):
                raise OSError("only a part of the line was written")
            self._torn.discard(name)
        except OSError as error:
            if written:
                self._torn.add(name)
            self.lost += 1
            if self.lost == 1:
                text = f"{self.path / name} cannot be written ({error.strerror or error}); the run goes on without it"
                self.notify(Warned(text, hint="free some space; later lines are written again"))


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


def list_runs(root: Path) -> list[RunStatus]:
    """Every run in a folder, newest first; what cannot be read is listed as "damaged"."""
    runs = [_status(path) for path in _folders(Path(root))]
    return sorted(runs, key=lambda run: (run.started or "", run.id), reverse=True)


def load_run(root: Path, id_or_unique_prefix: str) -> RunStatus:
    """One run by its id or the beginning of it; raises RunError with near ids when none or several fit."""
    folders = {path.name: path for path in _folders(Path(root))}
    wanted = id_or_unique_prefix
    fits = [wanted] if wanted in folders else [name for name in folders if wanted and name.startswith(wanted)]
    if len(fits) == 1:
        return _status(folders[fits[0]])
    if fits:
        raise RunError(f"{len(fits)} runs begin with {wanted!r}: {', '.join(sorted(fits))}", hint="give more of the id")
    near = [name for name in folders if wanted and wanted in name]
    near = near or difflib.get_close_matches(wanted, folders, cutoff=0.4) or sorted(folders, reverse=True)[:3]
    raise RunError(
        f"no run {wanted!r} in {root}",
        expected=f"one of {', '.join(near)}" if near else "a run; there is none yet",
        hint="peftkit runs list",
    )


def read_metrics(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) of a run in the order written; torn lines are left out."""
    found = []
    for record in _lines(Path(run) / "metrics.jsonl"):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            found.append((int(record["step"]), {key: float(value) for key, value in record["figures"].items()}))
    return found


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run in the order written; torn lines are left out."""
    return _lines(Path(run) / "events.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    records = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"the folder of runs {root} cannot be read: {error.strerror or error}") from error


def _status(path: Path) -> RunStatus:
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
    figures = dict(facts["figures"] or {}) or next((figures for _, figures in reversed(read_metrics(path))), {})
    if state == "running":
        last = datetime.now(UTC)
        if not is_alive(facts["process"]):
            state, last = "died", _last_sign(path)
            ended, error = _stamp(last), "the process ended without a word (killed, out of memory, or power lost)"
        seconds = max((last - started).total_seconds(), 0.0)
    saved_as = None if facts["saved_as"] is None else str(facts["saved_as"])
    return RunStatus(
        path.name, path, str(facts["recipe"]), state, _stamp(started), None if ended is None else str(ended),
        None if seconds is None else float(seconds), error, saved_as, figures, int(facts.get("lost_records", 0)),
    )  # fmt: skip


def _last_sign(path: Path) -> datetime:
    names = ("status.json", "events.jsonl", "metrics.jsonl")
    return datetime.fromtimestamp(max((path / name).stat().st_mtime for name in names if (path / name).exists()), UTC)


def _from_id(name: str) -> str | None:
    with contextlib.suppress(ValueError):
        return _stamp(datetime.strptime(name[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC))
    return None


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
