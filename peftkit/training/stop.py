"""Ctrl-C and SIGTERM while training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from peftkit.events import Report, Warned

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `asked`, and the second raises KeyboardInterrupt at once."""

    def __init__(self, report: Report) -> None:
        self.asked = False
        self._report = report
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # the signal came while the same stream was being written
            self._report(
                Warned(f"{name}: the step is finished and a checkpoint written, then the run ends; again to end now")
            )
