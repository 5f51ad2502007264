"""A real server over a tiny base, in a thread of its own; asked over real sockets."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from generation.adapters_lab import Lab

from peftkit.events import Event
from peftkit.generation.limits import Limits
from peftkit.generation.opening import Opened, find_base, open_engine
from peftkit.serving.host import Host
from peftkit.serving.http.listening import bind
from peftkit.serving.http.server import Server as HttpServer
from peftkit.serving.local import LocalEngine
from peftkit.serving.spec import ServeSpec

T = TypeVar("T")
SECONDS = 60.0
"""For anything that is waited for."""


@dataclass
class Server:
    """A server that runs; `events` is what it has reported."""

    served: HttpServer
    host: Host
    opened: Opened
    spec: ServeSpec
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    events: list[Event]

    @property
    def address(self) -> str:
        """http://127.0.0.1:PORT."""
        return self.served.address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something of the host's in the server's event loop: server.call(server.host.attach("tickets"))."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(SECONDS)

    def stop(self) -> None:
        """Drain, as SIGTERM does, and wait for the end."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.served.stop)
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "the server did not end"


@contextmanager
def serving(lab: Lab, names: Sequence[str] = (), *, runs: Path | None = None, **spec: Any) -> Iterator[Server]:
    """Serve registered names over the lab's base at 127.0.0.1 and a free port; `spec` is ServeSpec's."""
    settings = ServeSpec.model_validate({"port": 0, "follow_seconds": 0, **spec})
    opened = _opened(lab, names, settings)
    events: list[Event] = []
    engine = LocalEngine(opened)
    engine.start()
    host = Host(engine, lab.registry, settings)
    runs = runs or lab.folder / "runs"
    served = HttpServer(host, settings, bind(settings), runs=runs, report=events.append)
    ready, failed = threading.Event(), list[BaseException]()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await served.serve(names, ready.set)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    assert ready.wait(SECONDS), "the server did not start"
    if failed:
        raise failed[0]
    server = Server(served, host, opened, settings, loops[0], thread, events)
    try:
        yield server
    finally:
        server.stop()
    if failed:
        raise failed[0]


def _opened(lab: Lab, names: Sequence[str], spec: ServeSpec) -> Opened:
    versions = [lab.registry.resolve(name) for name in names]
    cache = lab.folder / "cache"
    found = find_base(versions, cache, base=str(lab.base), bits=32)
    return open_engine(found, versions, cache, limits=Limits(rows=spec.rows, waiting=spec.waiting))


@dataclass(frozen=True)
class Reply:
    """What a server answered; the names of the headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error; fails when it is not one, to the letter."""
        value = self.json
        assert set(value) == {"error"}
        assert set(value["error"]) == {"message", "type", "param", "code"}
        assert isinstance(value["error"]["message"], str)
        assert value["error"]["message"]
        found: dict[str, Any] = value["error"]
        return found


def ask(server: Server, method: str, path: str, value: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    """One request on a connection of its own; `value` is sent as JSON, bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    sent = dict(headers or {})
    if value is not None:
        value = value if isinstance(value, bytes) else json.dumps(value).encode()
        sent.setdefault("Content-Type", "application/json")
    try:
        connection.request(method, path, value, sent)
        answer = connection.getresponse()
        named = {name.lower(): text for name, text in answer.getheaders()}
        return Reply(answer.status, named, answer.read())
    finally:
        connection.close()


def until(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, f"after {SECONDS:g} s it is still not true that {what}"
        time.sleep(0.01)


def check_free(server: Server) -> None:
    """Nobody holds anything of a server that nobody asks any more: rows, seats, connections."""
    engine, fleet = server.opened.engine, server.opened.fleet
    until(lambda: engine.running == engine.waiting == 0, "every row is free")
    until(lambda: not any(resident.users for resident in fleet._residents.values()), "every seat is free")
    until(lambda: server.served.connections == 0, "every connection is closed")
