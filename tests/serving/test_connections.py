"""Clients that are slow, silent, rude or broken: the server stays, answers the others, and keeps nothing of theirs."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator

import pytest
from generation.adapters_lab import Lab
from generation.serving_lab import Oracle
from serving.rude import KINDS, TEXTS, asked, one
from serving.server_lab import Server, check_free, serving, until
from serving.wire import Wire, head, pieces, post, wire

pytestmark = pytest.mark.loopback

NAMES = ("tickets", "sql")
MODELS = ("base", *NAMES)


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Server]:
    """A server with little patience."""
    with serving(lab, NAMES, read_seconds=0.5, write_seconds=0.5) as running:
        small_buffers(running)
        yield running


def small_buffers(server: Server) -> None:
    """Otherwise the system would hold the whole of a tiny base's answer, for a client that does not read."""
    server.served._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)


@pytest.fixture(autouse=True)
def _nothing_is_kept(server: Server) -> Iterator[None]:
    yield
    check_free(server)


def prompt_of(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 259) for _ in range(4 + seed % 9)]


def expected(server: Server, oracle: Oracle, seed: int) -> str:
    """What a version answers alone."""
    model = MODELS[seed % 3]
    version = None if model == "base" else server.host.registry.resolve(model)
    return server.opened.backbone.tokenizer.decode(oracle.ids(version, prompt_of(seed), 12))


async def answers(at: Wire, seed: int, text: str) -> None:
    """A client that asks, half of them with a stream, and gets the version's own answer."""
    streamed = bool(seed // 3 % 2)
    await at.send(post(TEXTS, asked(MODELS[seed % 3], prompt_of(seed), stream=streamed)))
    reply = await at.reply()
    assert reply is not None
    assert reply.status == 200, reply.body
    if streamed:
        assert text == "".join(each["choices"][0]["text"] for each in pieces(reply.body))
    else:
        assert text == reply.json["choices"][0]["text"]


MALFORMED = {
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    "endless length": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    + b"9" * 5000
    + b"\r\n\r\n",
    "negative length": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "no such coding": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: zip\r\n\r\n",
    "bad chunk": head("POST", TEXTS, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}) + b"zz\r\n",
    "version": b"GET /health HTTP/11\r\nHost: localhost\r\n\r\n",
    "space in the target": b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "control in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) + b"\r\n\r\n",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_client_and_then_a_good_one(server: Server, oracle: Oracle, kind: str) -> None:
    text = expected(server, oracle, 4)

    async def both() -> None:
        await one(server, KINDS[kind])
        async with wire(server.port) as at:
            await answers(at, 4, text)

    asyncio.run(both())


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_not_http_is_refused(server: Server, text: str) -> None:
    async def refused() -> None:
        async with wire(server.port) as at:
            await at.send(MALFORMED[text])
            reply = await at.reply()
            assert reply is not None
            assert (reply.status, reply.headers["content-type"]) == (400, "application/json")
            assert (reply.error["code"], reply.headers["x-content-type-options"]) == ("invalid_http", "nosniff")
            assert await at.closed() == b""

    asyncio.run(refused())


def test_what_is_not_http_after_an_answer_only_ends_the_connection(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is there before the body is, and the body is broken."""

    async def refused() -> None:
        async with wire(server.port) as at:
            await at.send(head("POST", TEXTS, {"Content-Type": "text/plain", "Transfer-Encoding": "chunked"}))
            reply = await at.reply()
            assert reply is not None
            assert reply.status == 415
            await at.send(b"zz\r\n")
            assert await at.closed() == b""

    asyncio.run(refused())
    assert not caplog.records


def test_two_hundred_at_once(lab: Lab, server: Server, oracle: Oracle) -> None:
    """Half of them ask as they should, and get their answers; the others do everything above."""
    bad, texts = list(KINDS.values()), [expected(server, oracle, seed) for seed in range(100)]

    async def good(port: int, seed: int) -> None:
        async with wire(port) as at:
            await answers(at, seed, texts[seed])

    async def all_of_them(crowded: Server) -> None:
        clients = [good(crowded.port, i // 2) if i % 2 else one(crowded, bad[i // 2 % len(bad)]) for i in range(200)]
        await asyncio.gather(*clients)

    with serving(lab, NAMES, read_seconds=3, write_seconds=1) as crowded:
        small_buffers(crowded)
        asyncio.run(all_of_them(crowded))
        check_free(crowded)


def test_connections_over_the_limit_are_told_and_those_within_are_answered(
    lab: Lab, server: Server, oracle: Oracle
) -> None:
    texts = [expected(server, oracle, seed) for seed in range(2)]

    async def crowd(server: Server) -> None:
        async with wire(server.port) as first, wire(server.port) as second, wire(server.port) as third:
            for at in (first, second):
                await at.send(head("GET", "/health"))
                reply = await at.reply()
                assert reply is not None
                assert reply.status == 200
            await third.send(head("GET", "/health"))
            full = await third.reply()
            assert full is not None
            assert (full.status, full.error["code"], full.headers["retry-after"]) == (503, "too_many_connections", "1")
            assert await third.closed() == b""
            await answers(first, 0, texts[0])
            await first.send(head("GET", "/metrics"))
            metrics = await first.reply()
            assert metrics is not None
            assert b'peftkit_refused_total{status="503"} 1.0' in metrics.body
        await asyncio.to_thread(until, lambda: server.served.connections == 0, "they have left")
        async with wire(server.port) as again:
            await answers(again, 1, texts[1])

    with serving(lab, NAMES, connections=2) as narrow:
        asyncio.run(crowd(narrow))
        check_free(narrow)
