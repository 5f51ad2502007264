"""How events look: rich progress on a terminal, plain lines elsewhere, JSON lines with --json."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from peftkit import events, render

_PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal


# Data, answers and manifests may hold escape sequences that would steer the terminal.
_OVERRIDES = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # of the direction of writing
_CONTROL = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160), *_OVERRIDES) if chr(code) not in "\n\t"
}


def console(*, stderr: bool = False) -> Console:
    """A rich console that changes no text: no markup, no emoji codes, no wrapping."""
    return _Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)


class _Console(Console):
    """Falls silent when its reader is gone (`peftkit merge … | head`); rich would end the process, and the work."""

    def on_broken_pipe(self) -> None:
        """Write the rest nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def harmless(text: str) -> str:
    """Text without control characters, line ends and tabs apart."""
    return text.translate(_CONTROL)


# What JSON lets through unescaped and a terminal may obey.
_STEERING = re.compile("[\x7f-\x9f\ud800-\udfff]")


class Reporter:
    """A `Report` for people: decisions with reasons, tables, warnings, one moving progress line."""

    def __init__(self, *, as_json: bool = False, warnings_only: bool = False) -> None:
        self.as_json, self.warnings_only = as_json, warnings_only
        # With --json or a single answer, stdout carries the result alone; what happens on the way goes to stderr.
        self.console = console(stderr=as_json or warnings_only)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase = events.Phase("")
        self._last = 0.0
        self._deciding = False

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        if self.warnings_only and not isinstance(event, events.Warned):
            return
        if self.as_json:
            sys.stderr.write(json.dumps(event.as_record(), default=str) + "\n")
            return
        match event:
            case events.Phase():
                self._begin(event)
            case events.Progress():
                self._advance(event)
            case events.Decision():
                self._line(f"  {event.what}: {event.choice}  ({event.reason})")
            case events.Note():
                self._line(event.text)
            case events.Warned():
                self._line(f"! {event.text}" + (f"\n  to mend it: {event.hint}" if event.hint else ""))
            case events.Table():
                self._stop()
                self._line(f"\n{event.title}\n{_table(event)}\n")

    def _line(self, text: str) -> None:
        self.console.print(harmless(text), markup=False)

    def _begin(self, phase: events.Phase) -> None:
        self._stop()
        self._phase, self._last = phase, time.monotonic()
        if not self.console.is_terminal:
            total = f" ({phase.total} {phase.unit})" if phase.total else ""
            self._line(f"{phase.name}{total} …")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._progress.start()
        self._task = self._progress.add_task(phase.name, total=phase.total, figures="")

    def _advance(self, progress: events.Progress) -> None:
        figures = _figures(progress.figures)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=progress.done, figures=figures)
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_EVERY or progress.done == self._phase.total:
            self._last = now
            self._line(f"  {self._phase.name} {progress.done}/{self._phase.total or '?'}  {figures}".rstrip())

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def _table(event: events.Table) -> str:
    if any(event.columns):
        return render.table(event.columns, event.rows)
    return render.facts([(f"  {name}", value) for name, value in event.rows])


def _figures(figures: dict[str, float]) -> str:
    shown = []
    for name, unit, digits in (("loss", "", 3), ("tokens_per_s", " tokens/s", 0), ("peak_gb", " GB", 1)):
        if name in figures:
            label = "loss " if name == "loss" else "peak " if name == "peak_gb" else ""
            shown.append(f"{label}{figures[name]:.{digits}f}{unit}")
    return ", ".join(shown)


def show_interval(stored: dict[str, float | None]) -> str:
    """A stored interval as text; a single row has a point and no ends."""
    point, low, high = (stored.get(name) for name in ("point", "low", "high"))
    if point is None or low is None or high is None:
        return f"{render.number(point)} (one row: no interval)"
    return render.interval(point, low, high)


def show(value: Any, *, as_json: bool, text: str) -> None:
    """Print a command's result: JSON for programs, text for people."""
    if as_json:  # for programs: nothing may be replaced or wrapped
        text = json.dumps(value, indent=2, default=str, ensure_ascii=False)
        sys.stdout.write(_STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")
        sys.stdout.flush()
    else:
        console().print(harmless(text), markup=False)
