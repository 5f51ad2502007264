"""One connection to a client that may be slow, silent, or gone: whatever is waited for has a time."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from peftkit.serving.openai.failures import Refused, answer_for
from peftkit.serving.spec import ServeSpec

_SPARE = 64  # connections over the limit that are told so; more are closed without a word


class Connection(H11Protocol):
    """uvicorn's connection, which has no time for a request's head (0.54), nor for a client that does not read."""

    spec: ServeSpec

    @classmethod
    def under(cls, spec: ServeSpec) -> type[Connection]:
        """The class with these limits."""
        return type("Connection", (cls,), {"spec": spec})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        self._deadline: asyncio.TimerHandle | None = None
        self._lost = False
        super().connection_made(transport)
        over = len(self.connections) - self.spec.connections
        if over > _SPARE:
            transport.abort()
        self.app = self._watched(_full if over > 0 else self.app)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes; they only end the waiting when they are a whole head."""
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request, for the time of a whole head."""
        self._forget()
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is told something."""
        super().pause_writing()
        self._forget()
        self._wait()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._forget()
        self._wait()

    def timeout_keep_alive_handler(self) -> None:
        """Leave an idle connection to this class."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._lost = True
        self._forget()
        super().connection_lost(exc)

    def _watched(self, app: ASGIApp) -> ASGIApp:
        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            finally:
                self.loop.call_soon(self._wait)  # after an error uvicorn closes, and waits for the client to read

        return watched

    def _wait(self) -> None:
        """Close the connection in time, unless what is waited for now comes before."""
        seconds = self._patience()
        if seconds is None:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(seconds, self._late)

    def _patience(self) -> float | None:
        """How long the client may do nothing now; None while an answer is being made, and when it has gone."""
        if self._lost:
            return None
        if self.flow.write_paused or self.transport.is_closing():
            return self.spec.write_seconds
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        unread = self.transport.get_write_buffer_size() > 0
        return self.spec.write_seconds if unread else self.spec.read_seconds

    def _late(self) -> None:
        # Not `close`, which waits until the client has read everything.
        self.transport.abort()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    full = Refused(
        503,
        "too many connections",
        type="server_error",
        code="too_many_connections",
        headers={"Retry-After": "1", "Connection": "close"},
    )
    await answer_for(full)(scope, receive, send)
