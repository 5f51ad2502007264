"""One connection to a client that may be slow, silent, or gone: whatever is waited for has a time."""

from __future__ import annotations

import asyncio

import h11
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from peftkit.serving.http.guard import ALWAYS, FULL
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
        self.app = self._watched(_full(self.app) if over > 0 else self.app)
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

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else that is wrong."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else there is an answer already
            response = _malformed()
            begin = h11.Response(status_code=response.status_code, headers=response.raw_headers, reason=b"Bad Request")
            for each in (begin, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(each))
        self.transport.close()

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


def _full(app: ASGIApp) -> ASGIApp:
    async def full(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, FULL: True}, receive, send)

    return full


def _malformed() -> Response:
    message = (
        "this is not HTTP/1.1\n  expected: a request line, one Host header, and a body as long as it is said to be"
    )
    response = answer_for(Refused(400, message, code="invalid_http", headers={"Connection": "close"}))
    for name, value in ALWAYS.items():
        response.headers.setdefault(name, value)
    return response
