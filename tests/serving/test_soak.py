"""Minutes of everything at once: constant answers, and nothing that grows.

    PEFTKIT_SOAK_MINUTES=10 PEFTKIT_SOAK_JSON=soak.json pytest -m full tests/serving/test_soak.py

In rounds: good clients, bad clients and changes of what is served for some seconds; then all leave, and what is still
alive is counted. Without the variables it takes 2 minutes and keeps no figures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from generation.adapters_lab import Lab, make_lab
from generation.serving_lab import Oracle
from serving.rude import KINDS, one
from serving.server_lab import Server, check_free, serving
from serving.wire import Wire, head, pieces, post, wire

from peftkit.environment import environment

pytestmark = [pytest.mark.loopback, pytest.mark.full]

MINUTES = float(os.environ.get("PEFTKIT_SOAK_MINUTES", "2"))
ROUND = 6.0  # seconds of load before everything is counted
GOOD, BAD, NEW = 24, 8, 12
MOVING, STAYING, COMING = "tickets", "sql", ("red", "green", "blue")
PROMPTS = [[random.Random(seed).randrange(3, 259) for _ in range(3)] + [seed + 3] * (seed % 5) for seed in range(12)]
LEAK = 2048
"""Bytes of RSS for each request that would be called a leak: less than any request holds while it is answered."""


@dataclass
class Sample:
    """What is alive when nobody asks."""

    requests: int
    seconds: float
    tensor_bytes: int
    rss: int
    threads: int
    files: int
    adapters: int


@dataclass
class Soak:
    """A server, what its versions answer alone, and what was counted."""

    server: Server
    texts: dict[str, list[str]]
    ends: Counter[str] = field(default_factory=Counter)
    by_version: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    async def good(self, draw: random.Random, until: float) -> None:
        """Ask one name after the other; whatever version says that it answered, it is that version's answer."""
        models = ("base", STAYING, f"{MOVING}@prod", *COMING)
        while time.monotonic() < until:
            async with wire(self.server.port) as at:
                for _ in range(draw.randrange(1, 6)):
                    await self.asks(at, draw.choice(models), draw.randrange(len(PROMPTS)), draw.random() < 0.5)

    async def asks(self, at: Wire, model: str, prompt: int, streamed: bool) -> None:
        body = {"model": model, "prompt": PROMPTS[prompt], "max_tokens": NEW, "temperature": 0, "stream": streamed}
        await at.send(post("/v1/completions", body))
        reply = await at.reply()
        assert reply is not None
        if reply.status == 404:
            assert model in COMING, reply.body
            self.ends["not there"] += 1
            return
        assert reply.status == 200, reply.body
        answers = pieces(reply.body) if streamed else [reply.json]
        (version,) = {each["model"] for each in answers}
        text = "".join(each["choices"][0]["text"] for each in answers)
        assert text == self.texts[version][prompt], version
        assert version.startswith(model.partition("@")[0]) or model == "base"
        self.ends["answered"] += 1
        self.by_version[version] += 1

    async def bad(self, draw: random.Random, until: float) -> None:
        """One rude client after the other."""
        while time.monotonic() < until:
            kind = draw.choice(list(KINDS))
            await one(self.server, KINDS[kind])
            self.ends[kind] += 1

    async def changes(self, draw: random.Random, until: float) -> None:
        """Move the alias, and let names come and go."""
        versions = [name.partition("@")[2] for name in self.texts if name.startswith(f"{MOVING}@")]
        async with wire(self.server.port) as at:
            while time.monotonic() < until:
                name = draw.choice(COMING)
                for method, path, value in (
                    ("PUT", f"/v1/adapters/{MOVING}/aliases/prod", {"version": draw.choice(versions)}),
                    ("POST", "/v1/adapters", {"model": name}),
                    ("DELETE", f"/v1/adapters/{draw.choice(COMING)}", None),
                ):
                    data = b"" if value is None else json.dumps(value).encode()
                    typed = {"Content-Type": "application/json"} if data else {}
                    await at.send(head(method, path, {**typed, "Content-Length": str(len(data))}) + data)
                    reply = await at.reply()
                    assert reply is not None
                    assert reply.status in (200, 201) or (method == "DELETE" and reply.status == 404), reply.body
                    self.ends[f"{method} {reply.status}"] += 1
                await asyncio.sleep(0.05)

    async def round(self, seed: int) -> None:
        until, draw = time.monotonic() + ROUND, random.Random(seed)
        clients = [self.good(random.Random(draw.random()), until) for _ in range(GOOD)]
        clients += [self.bad(random.Random(draw.random()), until) for _ in range(BAD)]
        await asyncio.gather(*clients, self.changes(draw, until))

    def count(self, began: float) -> None:
        """What is alive now that nobody asks."""
        check_free(self.server)
        del self.server.events[:]
        gc.collect()
        process, requests = psutil.Process(), sum(self.ends.values())
        seconds, resident = time.monotonic() - began, len(self.server.host.load().resident)
        sample = Sample(
            requests, round(seconds, 1), tensor_bytes(), process.memory_info().rss, threading.active_count(),
            process.num_fds(), resident,
        )  # fmt: skip
        self.samples.append(sample)


def tensor_bytes() -> int:
    """Of every storage that a living tensor holds, each once."""
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    lab = make_lab(tmp_path)
    names = [MOVING, MOVING, MOVING, STAYING, *COMING]
    versions = [lab.lora(name, seed + 1, r=2 + seed % 3) for seed, name in enumerate(names)]
    lab.registry.tag(versions[0].reference, "prod")
    with serving(lab, [f"{MOVING}@prod", STAYING], read_seconds=2, write_seconds=1) as server:
        yield Soak(server, texts_of(lab, server))


def texts_of(lab: Lab, server: Server) -> dict[str, list[str]]:
    oracle, decode = Oracle(lab), server.opened.backbone.tokenizer.decode
    versions = [version for name in (MOVING, STAYING, *COMING) for version in lab.registry.versions(name)]
    known: dict[str, Any] = {version.reference: version for version in versions}
    known[server.host.base] = None
    assert len(known) == 8
    return {name: [decode(oracle.ids(each, prompt, NEW)) for prompt in PROMPTS] for name, each in known.items()}


def test_nothing_grows_and_every_answer_is_its_versions_own(soak: Soak) -> None:
    began, turn = time.monotonic(), 0
    while turn < 9 or time.monotonic() - began < 60 * MINUTES:
        asyncio.run(soak.round(turn))
        soak.count(began)
        turn += 1
    figures = summary(soak)
    if "PEFTKIT_SOAK_JSON" in os.environ:
        Path(os.environ["PEFTKIT_SOAK_JSON"]).write_text(json.dumps(figures, indent=2) + "\n")
    assert set(soak.by_version) == set(soak.texts), "every version has answered"
    assert set(KINDS) <= set(soak.ends) or MINUTES < 2
    last = len(soak.samples) // 3
    asked = soak.samples[-1].requests - soak.samples[-last - 1].requests
    for name, grown in (("tensor_bytes", asked), ("threads", 0), ("files", 0), ("adapters", 0)):
        values = [getattr(sample, name) for sample in soak.samples]
        most = max(values[:-last]) + grown  # a byte for each request is less than any tensor that one could leave
        assert max(values[-last:]) <= most, name  # the bank and the kept prompts fill up before
    assert figures["rss_bytes_per_request"] < LEAK


def summary(soak: Soak) -> dict[str, Any]:
    """The figures of a soak, with what it ran on."""
    second = soak.samples[len(soak.samples) // 2 :]
    slope = statistics.linear_regression([each.requests for each in second], [each.rss for each in second]).slope
    last = soak.samples[-1]
    return {
        "environment": environment(),
        "minutes": round(last.seconds / 60, 1),
        "requests": last.requests,
        "answers_compared": soak.ends["answered"],
        "ends": dict(sorted(soak.ends.items())),
        "answers_by_version": dict(sorted(soak.by_version.items())),
        "rss_bytes_per_request": round(slope, 1),
        "samples": [asdict(sample) for sample in soak.samples],
    }
