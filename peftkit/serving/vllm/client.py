"""vLLM's HTTP, as 0.32 speaks it, over a socket that only its user can open."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from peftkit.errors import ConfigError, EngineGone, GenerationError, PeftkitError

_KEPT, _KEPT_SECONDS = 64, 2.0
"""Connections that stay open between requests, and how long: vLLM closes its end after 5 seconds
(VLLM_HTTP_TIMEOUT_KEEP_ALIVE), and a request that is sent at that moment would fail."""
_SECONDS = 10.0
"""For questions that vLLM answers from what it knows."""
_BUSY = re.compile(r"^vllm:num_requests_(running|waiting)\{[^}]*\} (\S+)$", re.MULTILINE)


RESTART = "start the server again; `-- --max-model-len` and `-- --gpu-memory-utilization` say how much vLLM takes"
_LOAD_SECONDS = 120.0
"""For an adapter that goes into vLLM or out of it: it reads the files, and waits for those before."""


class Client:
    """Asks one vLLM."""

    def __init__(self, socket: Path) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=_KEPT, keepalive_expiry=_KEPT_SECONDS)
        self._http = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=str(socket), limits=limits),
            base_url="http://vllm",
            timeout=httpx2.Timeout(None, connect=_SECONDS),
            trust_env=False,
        )

    async def healthy(self) -> bool:
        """Whether it answers and says that it can."""
        try:
            return (await self._http.get("/health", timeout=_SECONDS)).status_code == 200
        except httpx2.TransportError:
            return False

    async def version(self) -> str:
        """Of vLLM."""
        return str((await self._asked("GET", "/version"))["version"])

    async def positions(self) -> int | None:
        """The most tokens of a prompt with its answer: the base's, or what it was started with."""
        models = (await self._asked("GET", "/v1/models"))["data"]
        found = [each["max_model_len"] for each in models if each.get("max_model_len")]
        return int(found[0]) if found else None

    async def busy(self) -> tuple[int, int]:
        """Requests that are being answered, and that wait."""
        try:
            text = (await self._http.get("/metrics", timeout=_SECONDS)).text
        except httpx2.TransportError as error:
            raise unreachable(error) from error
        counted = {"running": 0.0, "waiting": 0.0}
        for what, number in _BUSY.findall(text):
            counted[what] += float(number)
        return int(counted["running"]), int(counted["waiting"])

    async def load(self, name: str, folder: Path) -> None:
        """Let an adapter answer to a name. Raises GenerationError with vLLM's reason."""
        body = {"lora_name": name, "lora_path": str(folder)}
        await self._asked("POST", "/v1/load_lora_adapter", body, _LOAD_SECONDS)

    async def unload(self, name: str) -> None:
        """Let nobody answer to a name any more."""
        await self._asked("POST", "/v1/unload_lora_adapter", {"lora_name": name}, _LOAD_SECONDS)

    async def complete(self, body: Mapping[str, Any]) -> httpx2.Response:
        """Begin a completion; its events are read with `events`. Raises ConfigError for what vLLM does not take."""
        request = self._http.build_request("POST", "/v1/completions", json={**body, "stream": True})
        self._check_open()
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code == 200:
                return response
            try:
                content = await response.aread()
            finally:
                await response.aclose()
        except httpx2.TransportError as error:
            raise unreachable(error) from error
        raise refused(response.status_code, content)

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise EngineGone("vLLM has been ended", expected="a request before that", hint=RESTART)

    async def _asked(self, method: str, path: str, body: Any = None, timeout: float = _SECONDS) -> Any:
        self._check_open()
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout)
        except httpx2.TimeoutException as error:
            raise EngineGone(
                f"vLLM has not answered {path} within {timeout:g} seconds",
                expected="an engine that is well, which /health says",
                hint=f"ask again later, or {RESTART}",
            ) from error
        except httpx2.TransportError as error:
            raise unreachable(error) from error
        if response.status_code != 200:
            said = refused(response.status_code, response.content)
            raise said if isinstance(said, GenerationError) else GenerationError(str(said))
        return response.json() if method == "GET" else None


async def events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream, without its end mark. Raises what vLLM says went wrong, or that it is gone."""
    begun = b""
    try:
        async for received in response.aiter_bytes():
            *lines, begun = (begun + received).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise _named(int(chunk["error"].get("code") or 500), str(chunk["error"]["message"]))
                yield chunk
    except httpx2.TransportError as error:
        raise unreachable(error) from error


def refused(status: int, content: bytes) -> PeftkitError:
    """What a response means that is no success."""
    try:
        said = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = content.decode(errors="replace")[:200]
    return _named(status, said)


def unreachable(error: Exception) -> EngineGone:
    """What a lost connection means."""
    fact = f"vLLM cannot be reached: {type(error).__name__}"
    return EngineGone(fact, expected="a running vLLM", hint=f"/health says how it is; when it has ended, {RESTART}")


def _named(status: int, said: str) -> PeftkitError:
    if status in (400, 422):
        return ConfigError([said], where="the request, says vLLM")
    return GenerationError(f"vLLM answered {status}: {said}")
