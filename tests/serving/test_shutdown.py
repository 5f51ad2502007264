"""A real server process: what a signal lets end, what it cuts off, and what is left on disk when it is killed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator

import pytest
from generation.adapters_lab import Lab, make_lab
from serving.process import Process, started
from serving.process import begun as launched
from serving.server_lab import SECONDS, Reply, Server, serving, until
from serving.wire import Wire, head, pieces, post, wire

from peftkit.registry import check_root

pytestmark = pytest.mark.loopback

LONG = 1500
PROMPT = [5, 6, 7]
GREEDY = {"temperature": 0}


NEVER_LOADED = """
import sys, time
import peftkit.generation.opening as opening
def loading(*given, **more):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
opening.open_engine = loading
"""
BUSY = """
import sys, time
from peftkit.serving.local import LocalEngine
from peftkit.serving.spec import ServeSpec
def compiling(*given):
    print("compiling", file=sys.stderr, flush=True)
    time.sleep(600)
LocalEngine._submit = compiling
"""
IMPATIENT = f"{BUSY}ServeSpec.model_fields['drain_seconds'].default = 0.2\nServeSpec.model_rebuild(force=True)\n"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A base with room for long answers."""
    lab = make_lab(tmp_path_factory.mktemp("long"), max_position_embeddings=4096)
    for seed in range(2):
        lab.registry.tag(lab.lora("tickets", seed + 1).reference, f"v{seed}")
    return lab


@pytest.fixture
def process(long: Lab) -> Iterator[Process]:
    with started(long, ["tickets@v0"]) as running:
        yield running


async def chunk(at: Wire) -> bytes:
    """The next chunk of a response; empty at its end."""
    size = int(await at.reader.readuntil(b"\r\n"), 16)
    return (await at.reader.readexactly(size + 2))[:-2]


async def begun(at: Wire, new: int) -> bytes:
    """Ask for a long streamed answer; its first chunk."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    await at.send(
        post("/v1/completions", {"model": "tickets@v0", "prompt": PROMPT, "max_tokens": new, **GREEDY, **usage})
    )
    assert (await at.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    return await chunk(at)


async def asked(port: int, request: bytes) -> Reply:
    async with wire(port) as at:
        await at.send(request)
        reply = await at.reply()
        assert reply is not None
        return reply


async def draining(port: int) -> None:
    """Wait until the server says that it is on its way down."""
    async with asyncio.timeout(SECONDS):
        while True:
            health = await asked(port, head("GET", "/health"))
            if health.status == 503:
                assert health.json["status"] == "draining"
                return
            await asyncio.sleep(0.01)


def test_sigterm_lets_a_stream_end_and_takes_nothing_new(process: Process) -> None:
    async def watched() -> bytes:
        async with wire(process.port) as at:
            body = await begun(at, LONG)
            process.signal(signal.SIGTERM)
            await draining(process.port)
            for request in (post("/v1/completions", {"model": "base", "prompt": "a"}), head("GET", "/v1/models")):
                refused = await asked(process.port, request)
                assert (refused.status, refused.headers["retry-after"]) == (503, "1")
                assert refused.error["code"] == "shutting_down"
            while data := await chunk(at):
                body += data
            return body

    *events, last = pieces(asyncio.run(watched()))
    assert last["usage"]["completion_tokens"] == LONG
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert process.ended() == 0
    assert "Traceback" not in process.errors.read_text()


@pytest.mark.full
def test_a_second_signal_does_not_wait(process: Process) -> None:
    async def watched() -> None:
        async with wire(process.port) as at:
            await begun(at, 4000)
            process.signal(signal.SIGINT)
            await draining(process.port)
            process.signal(signal.SIGINT)
            said = await at.closed()
            assert b"[DONE]" not in said

    asyncio.run(watched())
    assert process.ended() == 130
    assert "Traceback" not in process.errors.read_text()


def test_what_takes_longer_than_it_is_given_is_cut_off_and_says_so(long: Lab) -> None:
    async def watched(server: Server) -> bytes:
        async with wire(server.port) as at, wire(server.port) as silent:
            body = await begun(at, 4000)
            server.loop.call_soon_threadsafe(server.served.stop)
            while data := await chunk(at):
                body += data
            assert await silent.closed() == b""
            return body

    with serving(long, ["tickets@v0"], drain_seconds=0.1) as server:
        *_, error, end = asyncio.run(watched(server)).decode().split("\n\n")
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert end == ""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_signal_while_the_base_loads_ends_it(long: Lab, number: signal.Signals) -> None:
    with launched(long, ["tickets@v0"], planted=NEVER_LOADED) as (popen, errors):
        until(lambda: "loading" in errors.read_text(), "it loads")
        popen.send_signal(number)
        assert popen.wait(SECONDS) == 130
        assert "peftkit: interrupted" in errors.read_text()
        assert "Traceback" not in errors.read_text()


async def waits_for_a_thread(at: Wire, process: Process) -> None:
    """Ask for something that a thread never finishes."""
    await at.send(post("/v1/completions", {"model": "tickets@v0", "prompt": PROMPT, "max_tokens": 4}))
    await asyncio.to_thread(until, lambda: "compiling" in process.errors.read_text(), "a thread is busy")


def test_a_second_signal_does_not_wait_for_a_thread(long: Lab) -> None:
    async def watched() -> Reply | None:
        async with wire(process.port) as at:
            await waits_for_a_thread(at, process)
            process.signal(signal.SIGTERM)
            await draining(process.port)
            process.signal(signal.SIGTERM)
            return await at.reply()

    with started(long, ["tickets@v0"], planted=BUSY) as process:
        reply = asyncio.run(watched())
        assert reply is not None
        assert (reply.status, reply.error["code"]) == (503, "shutting_down")
        assert process.ended() == 130
        assert "Traceback" not in process.errors.read_text()


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_thread_does_not_hold_a_server_longer_than_it_drains(long: Lab, number: signal.Signals, code: int) -> None:
    async def watched() -> None:
        async with wire(process.port) as at:
            await waits_for_a_thread(at, process)
            process.signal(number)
            await at.closed()

    with started(long, ["tickets@v0"], planted=IMPATIENT) as process:
        asyncio.run(watched())
        assert process.ended() == code
        assert "Traceback" not in process.errors.read_text()


@pytest.mark.full
def test_ctrl_c_ends_an_idle_server(process: Process) -> None:
    process.signal(signal.SIGINT)
    assert process.ended() == 130
    assert "Traceback" not in process.errors.read_text()


@pytest.mark.full
def test_killed_while_aliases_move_the_registry_is_whole(process: Process, long: Lab) -> None:
    versions = [long.registry.resolve(f"tickets@v{seed}") for seed in range(2)]

    async def moved() -> None:
        async with wire(process.port) as at:
            for turn in range(200):
                body = json.dumps({"version": versions[turn % 2].id}).encode()
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                await at.send(head("PUT", "/v1/adapters/tickets/aliases/prod", headers) + body)
                if turn == 20:
                    process.signal(signal.SIGKILL)
                if await at.reply() is None:
                    return

    asyncio.run(moved())
    assert process.ended() == -signal.SIGKILL
    assert long.registry.resolve("tickets@prod").id in {version.id for version in versions}
    assert not check_root(long.registry.root)
