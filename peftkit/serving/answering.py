"""What a server needs of an engine, its own or another one: answers by version, and adapters made ready beforehand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.template import Rendering
from peftkit.generation.requests import Completion, Logprob, Request
from peftkit.registry.store import Version


class Answer(Protocol):
    """One answer on its way. It belongs to one version from its beginning to its end."""

    @property
    def reference(self) -> str | None:
        """`name@version` of what answers; None is the base."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def scored(self) -> Sequence[Logprob]:
        """Log-probabilities of the tokens of all pieces so far, where they were asked for."""
        ...

    def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, each piece once; ends when the answer does. Raises what went wrong with it."""
        ...

    async def whole(self) -> Completion:
        """The answer, once it has ended. Raises what went wrong with it; a cancelled one is returned as far as it
        came."""
        ...

    def cancel(self) -> None:
        """Stop it, if it has not ended; what it held is free again before the engine's next step. Any number of
        times."""
        ...


@dataclass(frozen=True)
class Load:
    """How busy an engine is, and who is in it."""

    running: int = 0
    """Requests that are being answered."""
    waiting: int = 0
    """Requests that wait for a row."""
    resident: tuple[str, ...] = ()
    """`name@version` of adapters that can answer without being loaded."""
    hits: int = 0
    """Seats of adapters that were there already, since the start, as are the numbers below."""
    misses: int = 0
    """Adapters that had to be loaded, from host memory or disk."""
    miss_seconds: float = 0.0
    evictions: int = 0
    adapter_bytes: int = 0
    """Of the adapters that are in it now."""


class Answering(Protocol):
    """An engine behind the server. All of it is used from one event loop."""

    @property
    def base(self) -> str:
        """Where the base comes from, as a user names it: embedded:smollm2-135m, Qwen/Qwen3-4B, a folder's name."""
        ...

    @property
    def fingerprint(self) -> str:
        """The base's digest."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        ...

    @property
    def positions(self) -> int | None:
        """The most tokens of a prompt with its answer; None where nothing says."""
        ...

    def rendering(self, version: Version | None) -> Rendering:
        """How conversations become prompts for a version; None is the base."""
        ...

    async def prepare(self, version: Version) -> None:
        """Check a version and load it, so that it can answer. Raises PeftkitError, and then nothing has changed."""
        ...

    async def forget(self, version: Version) -> None:
        """A version is not answered under any name any more; answers on their way come to their end."""
        ...

    async def begin(self, version: Version | None, request: Request) -> Answer:
        """Queue a request (`request.adapter` is not read). Raises EngineBusy when the queue is full or closed, and
        PeftkitError for what cannot be answered as asked."""
        ...

    def load(self) -> Load:
        """How busy it is now."""
        ...

    def trouble(self) -> str | None:
        """Why it cannot answer anything at the moment; None while it can."""
        ...

    async def close(self, seconds: float) -> None:
        """Take no more requests, finish those that were taken within so many seconds, cancel the rest, free all."""
        ...
