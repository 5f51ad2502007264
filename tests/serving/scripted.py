"""An engine that answers what a test says: for answers that no tiny base writes, and for faults in their middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.template import Rendering
from peftkit.generation.requests import Completion, Finish, Logprob, Request
from peftkit.registry.store import Version
from peftkit.serving.answering import Load


@dataclass
class Scripted:
    """Answers with `texts`, one after another; one that is an exception comes after a piece of text."""

    tokenizer: Tokenizer
    texts: list[str | Exception]
    finish: Finish = "stop"
    renderings: dict[str, Rendering] = field(default_factory=dict)
    """Of adapters, by name, where they differ from the base's."""
    endless: bool = False
    """Whether an answer goes on until it is stopped."""
    meanwhile: Callable[[], Awaitable[object]] | None = None
    """What happens whenever an answer has begun."""
    rendered: list[str | None] = field(default_factory=list)
    """What was asked how it is rendered."""
    asked: list[Request] = field(default_factory=list)
    begun: list[Said] = field(default_factory=list)

    base = "scripted"
    fingerprint = "ab" * 32
    positions = None

    def rendering(self, version: Version | None) -> Rendering:
        self.rendered.append(version.reference if version else None)
        return self.renderings.get(version.name, Rendering()) if version else Rendering()

    async def prepare(self, version: Version) -> None:
        pass

    async def forget(self, version: Version) -> None:
        pass

    async def begin(self, version: Version | None, request: Request) -> Said:
        self.asked.append(request)
        said = self.texts[(len(self.asked) - 1) % len(self.texts)]
        if isinstance(said, Exception) and not said.args[1:]:
            raise said
        reference = version.reference if version else None
        answer = Said(self.tokenizer, said, self.finish, request, reference, self.endless)
        self.begun.append(answer)
        if self.meanwhile is not None:
            await self.meanwhile()
        return answer

    def load(self) -> Load:
        return Load()

    def trouble(self) -> str | None:
        return None

    async def close(self, seconds: float) -> None:
        pass


@dataclass
class Said:
    """One answer, in pieces of three characters."""

    tokenizer: Tokenizer
    said: str | Exception
    finish: Finish
    request: Request
    reference: str | None
    endless: bool = False
    cancelled: bool = False
    scored: tuple[Logprob, ...] = ()
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    async def pieces(self) -> AsyncIterator[str]:
        if isinstance(self.said, Exception):
            yield "so far "
            raise self.said
        text = self.tokenizer.decode(self.tokenizer.encode(self.said))
        for piece in _cut(text):
            yield piece
        if self.endless:
            await self.stopped.wait()

    async def whole(self) -> Completion:
        if isinstance(self.said, Exception):
            raise self.said
        ids = self.tokenizer.encode(self.said)
        return Completion(self.tokenizer.decode(ids), ids, self.finish == "stop", self.finish)

    def cancel(self) -> None:
        self.cancelled = True
        self.stopped.set()


def _cut(text: str) -> Sequence[str]:
    return [text[at : at + 3] for at in range(0, len(text), 3)]
