"""What stands before every route: who asks, how much, how slowly; and what every answer says to a browser."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftkit.events import Event, Report, Warned
from peftkit.serving.http import trust
from peftkit.serving.openai.failures import Draining, Refused, answer_for
from peftkit.serving.spec import ServeSpec

_WHILE_DRAINING = ("/health", "/metrics")
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""What a response says unless it says something else."""
FULL = "peftkit.full"
"""Stands in the scope of a connection over the limit."""
_LATER = {"Retry-After": "1", "Connection": "close"}


@dataclass(frozen=True)
class Served(Event):
    """A request was answered. Nothing of what was asked or answered is in it."""

    method: str
    path: str
    """Without the query."""
    status: int | None
    """None: the client left before."""
    milliseconds: int


class Guard:
    """An ASGI application that asks another one only what may be asked."""

    def __init__(
        self,
        app: ASGIApp,
        spec: ServeSpec,
        *,
        draining: Callable[[], bool],
        refused: Callable[[int], None],
        report: Report,
    ) -> None:
        """`draining` says whether the server is on its way down, when new requests are refused; `refused` is told each
        status from 400 on."""
        self.app, self.spec, self.draining, self.refused, self.report = app, spec, draining, refused, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers, begun = Headers(scope=scope), time.monotonic()
        answer = _Answer(send, self._browser_headers(headers))
        try:
            await self._serve(scope, headers, receive, answer)
        except _Left:
            pass
        except asyncio.CancelledError:  # the server waits no more
            if answer.status is not None:
                raise
            await answer_for(_down())(scope, receive, answer)
        except Exception as error:
            if not isinstance(error, Refused | Draining):
                self.report(Warned(_where(scope, error)))
            if answer.status is None:
                await answer_for(error)(scope, receive, answer)
            elif not answer.complete:
                raise  # uvicorn closes the connection: half an answer must not look like a whole one
        finally:
            if answer.status is not None and answer.status >= HTTPStatus.BAD_REQUEST:
                self.refused(answer.status)
            spent = round((time.monotonic() - begun) * 1000)
            self.report(Served(scope["method"], _path(scope), answer.status, spent))

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, answer: _Answer) -> None:
        method, path = scope["method"], scope["path"]
        if FULL in scope:
            raise Refused(503, "too many connections", type="server_error", code="too_many_connections", headers=_LATER)
        trust.check_host(headers, self.spec)
        trust.check_origin(method, path, headers, self.spec)
        if method == "OPTIONS" and "access-control-request-method" in headers:
            await Response(status_code=204)(scope, receive, answer)
            return
        if self.draining() and path not in _WHILE_DRAINING:
            raise _down()
        trust.check_key(method, path, headers, self.spec)
        trust.check_body(headers, self.spec)
        body = await _read(receive, self.spec)
        await self.app(scope, _again(body, receive), answer)

    def _browser_headers(self, headers: Headers) -> Mapping[str, str]:
        """What every answer to this request says beside its own headers."""
        if not self.spec.allow_origins:
            return ALWAYS
        origin = trust.allowed_origin(headers, self.spec)
        if origin is None:
            return {**ALWAYS, "Vary": "Origin"}
        asked = headers.get("access-control-request-headers", "authorization, content-type")
        return {
            **ALWAYS,
            "Vary": "Origin",
            "Cross-Origin-Resource-Policy": "cross-origin",
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
            "Access-Control-Allow-Headers": asked,
            "Access-Control-Expose-Headers": "Retry-After",
            "Access-Control-Max-Age": "600",
        }


class _Left(Exception):
    """The client closed the connection before its request was whole."""


class _Answer:
    """Sends a response with the headers that all have, and knows how far it is."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers = send, headers
        self.status: int | None = None
        self.complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = MutableHeaders(scope=message)
            for name, value in self._headers.items():
                own.setdefault(name, value)
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)


async def _read(receive: Receive, spec: ServeSpec) -> bytes:
    """The whole body. Raises Refused for one that is too large or too slow, _Left when it breaks off."""
    body = bytearray()
    try:
        async with asyncio.timeout(spec.read_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Left
                body += message.get("body", b"")
                if len(body) > spec.max_body_bytes:
                    raise trust.too_large(spec)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        late = f"the body did not arrive within {spec.read_seconds:g} seconds"
        raise Refused(408, late, code="request_timeout", headers={"Connection": "close"}) from None


def _down() -> Draining:
    return Draining("the server is shutting down", hint="ask again when it is back")


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then whatever comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _path(scope: Scope) -> str:
    """As it was sent: without the query, and with anything but visible ASCII still encoded."""
    return bytes(scope["raw_path"]).decode("ascii", "replace")


def _where(scope: Scope, error: Exception) -> str:
    """Where something unforeseen happened; its message is left out, because what was asked may be in it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rpartition('/peftkit/')[2]}:{frame.lineno}, in {frame.name}"
    return f"{scope['method']} {_path(scope)}: {type(error).__name__} at {place}: please report it"
