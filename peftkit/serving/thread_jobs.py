"""What wakes the one thread of an engine, and what it is given to do between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class ThreadJobs:
    """One thread waits; any other wakes it, or gives it a job."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._awake = self._over = False

    def wake(self) -> None:
        """There is something to do."""
        with self._wake:
            self._awake = True
            self._wake.notify()

    def submit(self, job: Callable[[], T], *, last: bool = False) -> Future[T] | None:
        """The result to come of a job, which is done before the thread goes on; after the `last` one it ends. None when
        that one has been given."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        with self._wake:
            if self._over:
                return None
            self._jobs.append(run)
            self._over = last
            self._wake.notify()
        return future

    def wait(self) -> bool:
        """Wait until there is something to do, and do the jobs; False when that was the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._awake or self._jobs or self._over)
            self._awake, over = False, self._over
        while self._jobs:
            self._jobs.popleft()()
        return not over
