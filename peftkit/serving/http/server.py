"""An app on a socket: from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
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
        """Serve until `stop`, then finish what was begun. Raises what attaching the names raises."""
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
                await self.host.engine.close(0)

    def stop(self) -> None:
        """Drain and end; called in the server's event loop."""
        self._stop.set()

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

    Raises what opening it and attaching the names raises, and KeyboardInterrupt at a second signal.
    """
    return asyncio.run(_until_signal(opening, names, ready))


async def _until_signal(
    opening: Callable[[], Awaitable[Server]], names: Sequence[str], ready: Callable[[Server], None]
) -> int:
    server = await opening()

    def told(number: int) -> None:
        name = signal.Signals(number).name
        server.report(Note(f"{name}: answers on their way are finished; a second one ends at once"))
        server.stop()

    with _first_signal(told) as seen:
        await server.serve(names, lambda: ready(server))
    return 130 if signal.SIGINT in seen else 0


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: its own end the answers on their way, or wait for them without end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _first_signal(told: Callable[[int], None]) -> Iterator[list[int]]:
    """Call `told` in the event loop at the first Ctrl-C or SIGTERM; the next one does what it did before."""
    loop, seen = asyncio.get_running_loop(), list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def first(number: int, frame: FrameType | None) -> None:
        restore()
        seen.append(number)
        loop.call_soon_threadsafe(told, number)

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, first) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        restore()


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
