"""Clients that are slow, silent, rude or broken: each takes a connection and does what no client should do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from serving.server_lab import Server
from serving.wire import Wire, chunked, head, post, wire

TEXTS = "/v1/completions"
MEGA = 10 << 20
PROMPT = [9, 8, 7, 6, 5]


def asked(model: str, prompt: list[int], new: int = 12, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, **more}


async def silent(at: Wire) -> None:
    assert await at.closed() == b""


async def half_a_head(at: Wire) -> None:
    await at.send(b"GET /health HTTP/1.1\r\nHost: local")
    assert await at.closed() == b""


async def slow_head(at: Wire) -> None:
    """A byte now and then: every one comes in time, the head does not."""

    async def dribble() -> None:
        await at.send(b"GET /health HTTP/1.1\r\n")
        while True:
            await at.send(b"X: 1\r\n")
            await asyncio.sleep(0.1)

    dribbling = asyncio.ensure_future(dribble())
    assert await at.closed() == b""
    dribbling.cancel()


async def slow_body(at: Wire) -> None:
    await at.send(head("POST", TEXTS, {"Content-Type": "application/json", "Content-Length": "1000"}) + b"{")
    reply = await at.reply()
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    assert await at.closed() == b""


async def short_body(at: Wire) -> None:
    """It says that there is more, and leaves."""
    await at.send(head("POST", TEXTS, {"Content-Type": "application/json", "Content-Length": "1000"}) + b"{}")
    at.writer.write_eof()
    await at.closed()


async def lying_length(at: Wire) -> None:
    """What comes after the length that was told is no request."""
    value = post(TEXTS, b"{}") + b"x" * 5000
    await at.send(value)
    first = await at.reply()
    assert first is not None
    assert first.status == 400
    await at.closed()


async def leaves_before_the_answer(at: Wire) -> None:
    await at.send(post(TEXTS, asked("sql", PROMPT, 400)))
    at.reset()


async def leaves_in_mid_stream(at: Wire) -> None:
    await at.send(post(TEXTS, asked("sql", PROMPT, 400, stream=True)))
    await at.reader.readuntil(b"data: ")
    at.reset()


async def closes_in_mid_stream(at: Wire) -> None:
    await at.send(post(TEXTS, asked("sql", PROMPT, 400, stream=True)))
    await at.reader.readuntil(b"data: ")


async def does_not_read(at: Wire) -> None:
    """It asks for more than the buffers on the way hold."""
    await given_up(at, head("GET", "/metrics") * 40)


async def does_not_read_a_stream(at: Wire) -> None:
    await given_up(at, post(TEXTS, asked("sql", PROMPT, 450, stream=True, logprobs=5)))


async def given_up(at: Wire, request: bytes) -> None:
    at.writer.transport.pause_reading()  # type: ignore[attr-defined]
    at.writer.write(request)
    # The system tells when something is sent to a connection that is no more.
    while not at.writer.is_closing():
        at.writer.write(b"\r\n")
        await asyncio.sleep(0.1)


async def random_bytes(at: Wire) -> None:
    await at.send(random.Random(3).randbytes(4000) + b"\r\n\r\n")
    said = await at.closed()
    assert said == b"" or said.startswith(b"HTTP/1.1 400")


async def malformed_json(at: Wire) -> None:
    for body in (b"{", b"[]", b"\xff\xfe", b'{"model": NaN}', b"[" * 20000, b'{"model": "tickets"'):
        await at.send(post(TEXTS, body))
        reply = await at.reply()
        assert reply is not None
        assert reply.status == 400
        assert reply.error["type"] == "invalid_request_error"


async def unknown_model(at: Wire) -> None:
    await at.send(post(TEXTS, asked("nobody", [5])))
    reply = await at.reply()
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


async def large_body(at: Wire) -> None:
    """Declared: it is refused before it comes, and what comes is thrown away."""
    await at.send(post(TEXTS, b" " * MEGA))
    reply = await at.reply()
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    await at.send(head("GET", "/health"))
    again = await at.reply()
    assert again is None or again.status == 200  # None: it was not all there in the time of a head


async def large_chunks(at: Wire) -> None:
    await at.send(chunked(TEXTS, b" " * MEGA))
    reply = await at.reply()
    assert reply is not None
    assert (reply.status, reply.error["code"]) == (413, "too_large")


async def expects_to_be_told(at: Wire) -> None:
    """curl asks before it sends a large body."""
    await at.send(post(TEXTS, b"{}", Expect="100-continue")[:-2])
    reply = await at.reply()
    assert reply is not None
    assert reply.status == 100
    await at.send(b"{}")
    reply = await at.reply()
    assert reply is not None
    assert reply.status == 400


async def many_headers(at: Wire) -> None:
    await at.send(head("GET", "/health", {f"X-{i}": "x" * 100 for i in range(20_000)}))
    said = await at.closed()
    assert said == b"" or said.startswith(b"HTTP/1.1 4")


async def long_header(at: Wire) -> None:
    await at.send(head("GET", "/health", {"X": "x" * (1 << 20)}))
    said = await at.closed()
    assert said == b"" or said.startswith(b"HTTP/1.1 4")


async def pipelined(at: Wire) -> None:
    """Three at once are answered in their order."""
    await at.send(head("GET", "/health") + head("GET", "/nowhere") + post(TEXTS, asked("sql", [9, 8], 3)))
    statuses = [reply.status for reply in [await at.reply() for _ in range(3)] if reply is not None]
    assert statuses == [200, 404, 200]


KINDS: dict[str, Callable[[Wire], Awaitable[None]]] = {
    kind.__name__: kind
    for kind in (
        silent, half_a_head, slow_head, slow_body, short_body, lying_length, leaves_before_the_answer,
        leaves_in_mid_stream, closes_in_mid_stream,
        does_not_read, does_not_read_a_stream, random_bytes, malformed_json, unknown_model,
        large_body, large_chunks, expects_to_be_told, many_headers, long_header, pipelined,
    )
}  # fmt: skip


SLOW = (does_not_read, does_not_read_a_stream)


async def one(server: Server, kind: Callable[[Wire], Awaitable[None]]) -> None:
    async with wire(server.port, 4096 if kind in SLOW else None) as at:
        await kind(at)
