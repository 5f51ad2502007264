"""The folder of a run in progress: its first files, its diary, its end, and going on with it after that.

    <id>/config.yaml environment.json      written before the folder appears under its name
         status.json                       state, process and result; replaced as a whole
         events.jsonl metrics.jsonl        appended line by line; a killed process may leave the last line torn
         report.html                       the page of the run, written again now and then
         .lock                             held while a process writes here

A process that was killed cannot say so. status.json therefore names the process (pid, start time, boot, host), and a
run that claims to be running while that process is gone is shown as "died".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import BaseFileLock

from peftkit.atomic import replace_file
from peftkit.config import dump_yaml
from peftkit.durable import sync_folder
from peftkit.errors import RunError
from peftkit.events import Event, Warned, silent
from peftkit.plain import as_json_text, as_plain
from peftkit.process import identity
from peftkit.runs.lock import hold
from peftkit.runs.page import PAGE, run_page
from peftkit.runs.status import load_folder, refuse_alive, stamp

_PAGE_EVERY = 10.0  # seconds
_PAGE_SHARE = 20  # a page that took a second is written again after 20: at most 5 % of a run's time goes into it


class RunFolder:
    """The folder of a run in progress."""

    def __init__(self, path: Path, status: Mapping[str, Any], lock: BaseFileLock) -> None:
        self.path = path
        self.id = path.name
        self.lost = 0
        """Events and metrics that could not be written."""
        self.notify: Callable[[Event], None] = silent
        """Told once, by a Warned, when the first line is lost."""
        self._status = dict(status)
        self._before: Mapping[str, Any] | None = None
        """The status that a reopened run had."""
        self._lock = lock
        # Seconds of the processes before this one count as passed.
        self._clock = time.monotonic() - float(status["seconds"] or 0.0)
        self._torn: set[str] = set()
        self._next_page = -math.inf
        self._page_failed = False

    @classmethod
    def create(cls, root: Path, recipe: str, config: Mapping[str, Any], environment: Mapping[str, str]) -> RunFolder:
        """Make `<root>/<UTC time>-<recipe>-<random>` with its first files; raises RunError when it cannot be."""
        root = Path(root)
        started = datetime.now(UTC)
        name = re.sub(r"[^A-Za-z0-9_]+", "-", Path(recipe).name.removesuffix(".py")).strip("-")[:60] or "run"
        status = {
            "format": 1, "recipe": recipe, "state": "running", "started": stamp(started), "ended": None,
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
        return cls(path, status, hold(path))

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Go on with a run whose process has ended: it runs again, in this process, and its seconds go on.

        Raises RunError when a process still works on it, or when its status cannot be read.
        """
        path = Path(path)
        refuse_alive(load_folder(path), "gone on with")
        if not path.is_dir():
            raise RunError(f"there is no run in {path}", expected="the folder of a run", hint="peftkit runs list")
        lock = hold(path)
        try:
            # Read again: between the first look and the lock another process may have gone on with the run, and ended.
            before = load_folder(path)
            refuse_alive(before, "gone on with")
            if before.state == "damaged":
                raise RunError(
                    f"run {before.id} cannot be gone on with: {before.error}",
                    expected=f"the status that a run wrote in {path / 'status.json'}",
                    hint="start it again without --resume",
                )
            status = json.loads((path / "status.json").read_bytes())
            found = dict(status)
            status["resumed"] = [*status.get("resumed", []), stamp(datetime.now(UTC))]
            if before.saved_as is not None:  # what is learned from now on is in no registry yet
                status["saved_before"] = [*status.get("saved_before", []), before.saved_as]
            again = {"state": "running", "ended": None, "error": None, "saved_as": None, "seconds": before.seconds}
            run = cls(path, {**status, **again, "process": identity(os.getpid())}, lock)
            run._before = found
            run.lost = before.lost_records
            run._torn = {name for name in ("events.jsonl", "metrics.jsonl") if _is_torn(path / name)}
            run.write_json("status.json", run._status)
        except BaseException:
            lock.release()
            raise
        return run

    def record(self, event: Event) -> None:
        """Append an event to events.jsonl; never raises for a full disk (see `lost`)."""
        self._append("events.jsonl", {"at": stamp(datetime.now(UTC)), **event.as_record()})

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
        """Write the end of the run to status.json (error=, saved_as=, figures=, …), its last page, and let go of it.

        Raises RunError if the status cannot be written.
        """
        seconds = round(time.monotonic() - self._clock, 3)
        end = {"state": state, "ended": stamp(datetime.now(UTC)), "seconds": seconds, "lost_records": self.lost}
        self._status.update({**facts, **end})
        try:
            self.write_json("status.json", self._status)
            self.write_page(force=True)
        finally:
            self._lock.release()

    def give_back(self) -> None:
        """Let go of a reopened run as it was found: it was not gone on with."""
        try:
            if self._before is not None:
                self.write_json("status.json", self._before)
        finally:
            self._lock.release()

    def write_page(self, *, force: bool = False) -> None:
        """Write report.html, unless that was done a moment ago; never raises, whatever the disk or a file says."""
        began = time.monotonic()
        if began < self._next_page and not force:
            return
        try:
            replace_file(self.path / PAGE, run_page(self.path))
        except Exception as error:  # hours of training must not end for a picture of them
            if not self._page_failed:
                self._page_failed = True
                self.notify(Warned(f"{self.path / PAGE} cannot be written ({error}); the run goes on without it"))
        took = time.monotonic() - began
        self._next_page = began + max(_PAGE_EVERY, _PAGE_SHARE * took)

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


def _is_torn(path: Path) -> bool:
    """Whether a killed process left the last line of a file without its end."""
    try:
        with path.open("rb") as handle:
            handle.seek(-1, os.SEEK_END)
            return handle.read(1) != b"\n"
    except OSError:  # missing, or empty
        return False
