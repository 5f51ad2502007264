"""An engine of this process behind the server: one thread steps it, and the event loop hears of what comes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TypeVar

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.template import Rendering
from peftkit.errors import EngineBusy, PeftkitError
from peftkit.generation.limits import positions_of
from peftkit.generation.opening import Opened, check_answers
from peftkit.generation.requests import Completion, Request
from peftkit.generation.running import Ticket
from peftkit.registry.store import Version
from peftkit.serving.answering import Load
from peftkit.serving.faults import Faults
from peftkit.serving.known import Known
from peftkit.serving.local_answer import LocalAnswer
from peftkit.serving.thread_jobs import ThreadJobs
from peftkit.tuning.stored import read

_AFTER_FAULT = 0.1
"""Seconds before the next step when one raised: it may raise again and again."""
_ATTEMPTS = 16
"""Steps in which a version that is made ready may find no seat, before its files are read without one."""
_CLOSED, _BEFORE = "the engine has been closed", "a request before that"
T = TypeVar("T")


class LocalEngine:
    """Answers over an opened engine, which nobody else may use any more."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._engine, self._fleet = opened, opened.engine, opened.fleet
        self._known = Known(opened.versions)
        self._thread = threading.Thread(target=self._drive, name="peftkit-engine", daemon=True)
        self._jobs = ThreadJobs()
        self._submitted: deque[Ticket] = deque()
        self._unfinished: list[Ticket] = []
        self._faults = Faults()
        self._load = self._counted()
        self._on_way: set[LocalAnswer] = set()
        self._beginning: dict[asyncio.Future[Ticket], asyncio.Future[LocalAnswer]] = {}
        self._late = False
        self._idle = asyncio.Event()

    @classmethod
    def opened_by(cls, opening: Callable[[], Opened]) -> LocalEngine:
        """Open an engine in the thread that will step it, and begin to answer. Raises what `opening` raises.

        A thread that computes has a pool of OpenMP's, and with a second pool, of the thread that loaded the base, every
        step is a third slower (docs/decisions/0021).
        """
        opened: Future[LocalEngine] = Future()

        def run() -> None:
            try:
                engine = cls(opening())
            except BaseException as error:
                opened.set_exception(error)
                return
            engine._thread = threading.current_thread()
            opened.set_result(engine)
            engine._drive()

        threading.Thread(target=run, name="peftkit-engine", daemon=True).start()
        return opened.result()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def base(self) -> str:
        """Where the base comes from."""
        return self._opened.backbone.base.portable

    @property
    def fingerprint(self) -> str:
        """The base's digest."""
        return self._opened.backbone.identity.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        return self._opened.backbone.tokenizer

    @property
    def positions(self) -> int | None:
        """The most tokens of a prompt with its answer."""
        return positions_of(self._opened.backbone.model)

    def rendering(self, version: Version | None) -> Rendering:
        """How the training of what answers rendered its rows."""
        return self._opened.rendering(version)

    async def prepare(self, version: Version) -> None:
        """Check a version and load it. Raises PeftkitError, and then nothing has changed.

        While answers on their way leave no seat for it, its files are read, and it is loaded when it is asked.
        """
        check_answers([version])
        try:
            with self._known.during(version):
                identity = await asyncio.to_thread(self._fleet.identify, version.reference)
                assert identity is not None
                for _ in range(_ATTEMPTS):
                    if await self._between_steps(lambda: self._loaded(identity)):
                        break
                else:
                    await asyncio.to_thread(read, version)
                self._known.keep(version)
        except BaseException:
            self._known.leave(version)
            self._jobs.wake()
            raise

    async def forget(self, version: Version) -> None:
        """A version is not answered under any name any more; answers on their way come to their end."""
        self._known.drop(version)
        self._jobs.wake()

    async def begin(self, version: Version | None, request: Request) -> LocalAnswer:
        """Queue a request. Raises EngineBusy when the queue is full or closed, and PeftkitError for what cannot be
        answered as asked."""
        loop = asyncio.get_running_loop()
        # Apart from the event loop: a schema is compiled, a version that was not asked before is looked at on disk.
        work = loop.run_in_executor(None, self._submit, version, request)
        begun: asyncio.Future[LocalAnswer] = loop.create_future()
        self._beginning[work] = begun
        work.add_done_callback(self._begun)
        try:
            return await begun
        except asyncio.CancelledError:
            if begun.done() and not begun.cancelled() and begun.exception() is None:
                begun.result().cancel()  # whoever asked left at the very moment
            raise

    def load(self) -> Load:
        """How busy it is now."""
        return replace(self._load, running=self._engine.running, waiting=self._engine.waiting)

    def trouble(self) -> str | None:
        """Why it cannot answer anything at the moment; None while it can."""
        return self._faults.trouble or (None if self._thread.is_alive() else "the engine does not run")

    async def close(self, seconds: float) -> None:
        """Take no more requests, finish those that were taken within so many seconds, cancel the rest, free all."""
        self._engine.close()
        self._settle()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._late = True
            for begun in self._beginning.values():
                if not begun.done():
                    begun.set_exception(EngineBusy(_CLOSED, expected=_BEFORE))
            for answer in self._on_way:
                answer.cancel()
            self._settle()
            await self._idle.wait()
        if self._thread.is_alive():
            with suppress(PeftkitError):  # seats that a lost device never gave back: they go with the process
                await self._between_steps(self._fleet.close, last=True)
            await asyncio.to_thread(self._thread.join)

    # ---- in the event loop

    async def _between_steps(self, job: Callable[[], T], *, last: bool = False) -> T:
        """What a job gives that the engine's thread does between two steps; it ends after the last one."""
        future = self._jobs.submit(job, last=last) if self._thread.is_alive() else None
        if future is None:
            raise EngineBusy(_CLOSED, expected=_BEFORE)
        return await asyncio.wrap_future(future)

    def _begun(self, work: asyncio.Future[Ticket]) -> None:
        """A request was submitted, or refused; whoever asked may have left, or have been given up."""
        begun = self._beginning.pop(work)
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        if error is not None:
            if not begun.done():
                begun.set_exception(error)
        elif self._late:
            work.result().cancel()
        else:
            self._on_way.add(answer := LocalAnswer(work.result(), self._ended))
            answer.cancel() if begun.done() else begun.set_result(answer)
        self._settle()

    def _ended(self, answer: LocalAnswer) -> None:
        self._on_way.discard(answer)
        self._settle()

    def _settle(self) -> None:
        if not self._on_way and (self._late or not self._beginning):
            self._idle.set()
        else:
            self._idle.clear()

    # ---- in other threads

    def _submit(self, version: Version | None, request: Request) -> Ticket:
        with self._known.during(version) if version is not None else nullcontext():
            ticket = self._engine.submit(replace(request, adapter=version.reference if version else None))
            self._submitted.append(ticket)  # whose version is known: it is not let go in between
        self._jobs.wake()
        return ticket

    def _loaded(self, version: Version) -> bool:
        seat = self._fleet.seat(version)
        if seat is None:
            return False
        self._fleet.release(seat)
        return True

    # ---- in the engine's thread

    def _drive(self) -> None:
        while self._jobs.wait():
            more = self._step()
            self._load = self._counted()
            if more:
                self._jobs.wake()

    def _step(self) -> bool:
        try:
            more = self._engine.step()
            for version in self._known.left(lambda: {each.reference for each in self._current() if not each.done}):
                self._fleet.forget(version.id)
        except BaseException as error:
            # Whatever it is, this thread is the only one that there is: who waits hears of it, and it goes on.
            self._faults.raised(error)
            self._fail(error)
            time.sleep(_AFTER_FAULT)
            return True
        self._look()
        return more

    def _look(self) -> None:
        """How the answers ended that this step ended."""
        ended = [ticket for ticket in self._current() if ticket.done]
        self._unfinished = [ticket for ticket in self._unfinished if not ticket.done]
        self._faults.ended(ended)

    def _fail(self, error: BaseException) -> None:
        """End all answers on their way; the next step takes away what they hold."""
        for ticket in self._current():
            ticket.cancel()
            failed = Completion("", [], stopped=False, finish="failed", adapter=ticket.reference, error=str(error))
            ticket.close(failed, error)
        self._unfinished = []

    def _current(self) -> list[Ticket]:
        while self._submitted:
            self._unfinished.append(self._submitted.popleft())
        return self._unfinished

    def _counted(self) -> Load:
        """Counted here, since it waits for whatever is just loaded."""
        known = self._fleet.statistics()
        return Load(
            resident=known.resident,
            hits=known.hits,
            misses=known.from_host.count + known.from_disk.count,
            miss_seconds=known.from_host.seconds + known.from_disk.seconds,
            evictions=known.evictions,
            adapter_bytes=known.bytes,
        )
