"""An app on a socket: from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn

from peftkit.events import Note, Report, silent
from peftkit.serving.host import Host
from peftkit.serving.http.app import create_app
from peftkit.serving.http.connection import Connection
from peftkit.serving.http.listening import address_of
from peftkit.serving.spec import ServeSpec

_HEAD_BYTES = 16 * 1024  # of a request line and its headers
_LAST_SECONDS = 5.0  # for the last bytes of responses, once every answer has ended
_CUT_OFF_SECONDS = 2.0  # from the second signal to the end of the process
_LAST_WORDS_SECONDS = 0.5  # of these, to say to clients that they are cut off
_THREADS_SECONDS = 1.0  # for threads that are busy when all has ended, as with a schema that nobody waits for any more
_INTERRUPTED = 130


class Server:
    """A host that is asked over HTTP."""

    def __init__(
        self, host: Host, spec: ServeSpec, listening: socket.socket, *, runs: Path, report: Report = silent
    ) -> None:
        self.host, self.spec, self.report, self.address = host, spec, report, address_of(listening)
        self._listening = listening
        self._http = _Uvicorn(_settings(create_app(host, spec, runs=runs, report=report), spec))
        self._stop = asyncio.Event()

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._http.server_state.connections)

    async def serve(self, names: Sequence[str], ready: Callable[[], None]) -> None:
        """Serve until `stop`, then finish what was begun; when it is cancelled, cut that off.

        Raises what attaching the names raises.
        """
        closed = False
        try:
            await self.host.start(names)
            serving = asyncio.ensure_future(self._http.serve(sockets=[self._listening]))
            await self._until_stopped(serving, ready)
            await self.host.close()
            closed = True
            self._http.should_exit = True
            await serving
        finally:
            if not closed:  # an error, or whoever waits for the answers on their way waits no more
                await self._cut_off()

    def stop(self) -> None:
        """Drain and end; called in the server's event loop."""
        self._stop.set()

    async def _cut_off(self) -> None:
        """End what is on its way; whoever asked for it is told so."""
        closing = asyncio.ensure_future(self.host.engine.close(0))
        on_way = tuple(self._http.server_state.tasks)
        await asyncio.wait((closing, *on_way), timeout=_LAST_WORDS_SECONDS)
        for each in on_way:  # they wait for something else than an answer; the guard answers for them
            each.cancel()
        await closing

    async def _until_stopped(self, serving: asyncio.Future[None], ready: Callable[[], None]) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            while not (self._http.started or serving.done()):
                await asyncio.sleep(0.01)
            if not serving.done():
                ready()
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()


def run(opening: Callable[[], Awaitable[Server]], names: Sequence[str], ready: Callable[[Server], None]) -> int:
    """Open a server and serve until Ctrl-C or SIGTERM, then drain; the process's exit code.

    A second signal cuts off what is on its way, and a thread that is busy then holds the process for a moment only.
    Raises what opening the server and attaching the names raises, and KeyboardInterrupt at a signal while it opens.
    """
    try:
        return asyncio.run(_until_signal(opening, names, ready))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


async def _until_signal(
    opening: Callable[[], Awaitable[Server]], names: Sequence[str], ready: Callable[[Server], None]
) -> int:
    server, serving, loop = await opening(), asyncio.current_task(), asyncio.get_running_loop()
    assert serving is not None

    def first(number: int) -> None:
        name = signal.Signals(number).name
        server.report(Note(f"{name}: answers on their way are finished; a second one ends at once"))
        server.stop()

    def came(number: int, nth: int) -> None:
        if nth == 1:
            _end_within(server.spec.drain_seconds + 2 * _LAST_SECONDS, _code(number))
            loop.call_soon_threadsafe(first, number)
        elif nth == 2:
            _end_within(_CUT_OFF_SECONDS, _INTERRUPTED)
            loop.call_soon_threadsafe(serving.cancel)

    with _signals(came) as seen:
        try:
            await server.serve(names, lambda: ready(server))
        except asyncio.CancelledError:
            if len(seen) < 2:
                raise
    if not seen:
        return 0
    if len(seen) > 1:
        return _INTERRUPTED
    _end_within(_THREADS_SECONDS, _code(seen[0]))  # asyncio waits for all threads
    return _code(seen[0])


def _code(number: int) -> int:
    return _INTERRUPTED if number == signal.SIGINT else 0


def _end_within(seconds: float, code: int) -> None:
    """End the process then, whatever it still does: a thread that computes for nobody cannot be stopped.

    An alarm and no thread: it interrupts the waiting for threads as well.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: its own end the answers on their way, or wait for them without end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _signals(came: Callable[[int, int], None]) -> Iterator[list[int]]:
    """Call `came` at each Ctrl-C or SIGTERM, with its number and how many there were; gives the numbers."""
    seen = list[int]()

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        came(number, len(seen))

    before = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for each, old in before.items():
            signal.signal(each, old)


def _settings(app: object, spec: ServeSpec) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=Connection.under(spec),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",  # what happens is reported as events
        access_log=False,
        proxy_headers=False,  # whoever asks could write them
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
