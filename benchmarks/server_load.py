"""Clients that ask an OpenAI-compatible server, each the next thing when the last is answered, and what they saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx2
import numpy as np

NEW_TOKENS = 32
SENTENCE = "the lamp order kettle broke and came late with money back please check my parcel number again today"
_LONGEST = 1800.0


@dataclass(frozen=True)
class Seen:
    """One answer, as its client saw it; times in seconds since the request was sent."""

    model: str
    prompt: str
    text: str
    first: float
    """When the first text came."""
    last: float


def prompts(count: int) -> list[str]:
    """Different sentences of 24 words."""
    draw, words = random.Random(0), SENTENCE.split()
    return [" ".join(draw.choices(words, k=24)).capitalize() + "." for _ in range(count)]


async def asked(address: str, models: Sequence[str], clients: int, requests: int) -> tuple[list[Seen], float]:
    """All answers, and the seconds from the first request to the last answer; models take turns."""
    texts = prompts(requests)
    left = iter([(models[i % len(models)], text) for i, text in enumerate(texts)])
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    seen: list[Seen] = []
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=_LONGEST) as client:

        async def work() -> None:
            for model, text in left:
                seen.append(await _one(client, model, text))

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return seen, time.perf_counter() - start


async def _one(client: httpx2.AsyncClient, model: str, text: str) -> Seen:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    start, first, pieces = time.perf_counter(), None, []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
            if piece:
                first = first or time.perf_counter() - start
                pieces.append(piece)
    if first is None:
        raise RuntimeError(f"{model} answered nothing to {text!r}")
    return Seen(model, text, "".join(pieces), first, time.perf_counter() - start)


def figures(seen: Sequence[Seen], seconds: float, count: Callable[[str], int]) -> dict[str, float]:
    """Requests and tokens a second, and the times to the first text in milliseconds; `count` gives a text's tokens."""
    first = np.array([each.first for each in seen]) * 1000
    tokens = sum(count(each.text) for each in seen)
    return {
        "requests": len(seen),
        "seconds": round(seconds, 2),
        "requests_per_second": round(len(seen) / seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_ms_p50": round(float(np.percentile(first, 50)), 1),
        "first_token_ms_p99": round(float(np.percentile(first, 99)), 1),
    }
