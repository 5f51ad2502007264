"""A client that may write anything to a socket, at any speed, and leave at any moment."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from serving.server_lab import Reply

_SECONDS = 30.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing throws away what was not sent, and says so


def head(method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A request's head."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        *(f"{name}: {text}" for name, text in (headers or {}).items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def post(path: str, value: Any, **headers: str) -> bytes:
    """A request with a JSON body; bytes are sent as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head("POST", path, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}) + body


def chunked(path: str, body: bytes, size: int = 1 << 16) -> bytes:
    """A request whose body does not say how long it is."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    pieces = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"
    return head("POST", path, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}) + pieces


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Write, as far as the other side takes it."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            pass  # it has closed; what it said before can still be read

    async def reply(self) -> Reply | None:
        """The next response; None when the server has closed before one was whole."""
        try:
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines if line)}
            return Reply(int(status.split()[1]), headers, await self._body(headers))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def closed(self) -> bytes:
        """What comes until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def reset(self) -> None:
        """Leave, without a word."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.writer.transport.abort()

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return b""
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return body


@asynccontextmanager
async def wire(port: int, receive_bytes: int | None = None) -> AsyncIterator[Wire]:
    """Connect; everything that is done with it must end in time. A small receive buffer makes a slow reader felt."""
    async with asyncio.timeout(_SECONDS):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=client, limit=1 << 16)
        try:
            yield Wire(reader, writer)
        finally:
            writer.close()


def pieces(body: bytes) -> list[dict[str, Any]]:
    """The events of a streamed answer; fails unless it is whole."""
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
