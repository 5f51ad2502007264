"""Which names are answered, and by which versions: a name changes hands whole, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from peftkit.canonical import canonical_json
from peftkit.errors import ConfigError, DataError, EngineBusy, RegistryError
from peftkit.generation.answer import prompt_of
from peftkit.generation.requests import Request
from peftkit.registry.layout import check_alias, parse_reference
from peftkit.registry.store import Registry, Version
from peftkit.serving.answering import Answer, Answering, Load
from peftkit.serving.binding import Binding
from peftkit.serving.names import Model
from peftkit.serving.openai.failures import Draining
from peftkit.serving.spec import ServeSpec

__all__ = ["Host", "Model"]
T = TypeVar("T")
_BASE = "base"


class Host:
    """Names over an engine and a registry.

    All methods are called from one event loop. A change is prepared in the engine first and then takes effect between
    two requests: whoever was asked before ends on the version that it began with, and when anything goes wrong, names
    and registry are as they were. A change that has begun is carried out, even if whoever asked for it goes away.
    """

    def __init__(self, engine: Answering, registry: Registry, spec: ServeSpec) -> None:
        self.engine, self.registry, self.spec = engine, registry, spec
        self._binding = Binding(engine, registry)
        self._base = Model(engine.base, None)
        self._one_at_a_time = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self._following: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self, names: Sequence[str]) -> None:
        """Attach the first names and begin to follow the registry. Raises what `attach` raises."""
        for name in names:
            await self.attach(name)
        if self.spec.follow_seconds:
            self._following = asyncio.create_task(self._follow())

    @property
    def base(self) -> str:
        """Where the base comes from; it answers to this and to `base`."""
        return self.engine.base

    @property
    def swaps(self) -> int:
        """How often a name changed its version."""
        return self._binding.swaps

    @property
    def fingerprint(self) -> str:
        """The base's digest."""
        return self.engine.fingerprint

    def load(self) -> Load:
        """How busy the engine is."""
        return self.engine.load()

    def trouble(self) -> str | None:
        """Why nothing can be answered now; None while it can."""
        return "the server is shutting down" if self._closing else self.engine.trouble()

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._closing

    def models(self) -> list[Model]:
        """The base first, then the attached names in their order."""
        return [self._base, *self._binding.names.listed]

    async def find(self, model: str) -> Version | None:
        """What answers to a request's `model` now. The base is `base` or its source's name. An attached `tickets`
        answers for `tickets@alias` and `tickets@version` too; an attached `sql@prod` for `sql@prod` alone. An alias is
        kept from its first request on, and followed as attached names are.

        Raises AdapterNotFound, naming what is served.
        """
        if model in (_BASE, self.base):
            return None
        if (attached := self._binding.names.get(model)) is not None:
            return attached.version
        if self._binding.names.get(model.partition("@")[0]) is None:
            raise self._binding.unknown(model)
        version = await asyncio.to_thread(self._binding.resolve, model)
        if parse_reference(model).alias is None:
            return version
        return (await self._alone(lambda: self._binding.keep(model))).version

    async def chat(
        self, model: str, turns: Sequence[Mapping[str, Any]], like: Request, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Answer:
        """Begin the next turn of a conversation, rendered as the adapter's training rendered its rows."""
        version = await self.find(model)
        return await self.begin(version, await self.rendered(version, turns, tools), like)

    async def complete(self, model: str, prompt: str | Sequence[int], like: Request) -> Answer:
        """Begin to go on with a text (with the tokenizer's BOS before it) or with token ids."""
        version = await self.find(model)
        return await self.begin(version, await self.encoded(prompt), like)

    async def rendered(
        self, version: Version | None, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """The prompt that a conversation is for a version which was found. Raises DataError."""
        rendering = self.engine.rendering(version)
        return await asyncio.to_thread(prompt_of, turns, self.engine.tokenizer, rendering, tools)

    async def encoded(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The prompt that a text is, with the tokenizer's BOS before it; token ids stay what they are. Raises
        DataError."""
        return await asyncio.to_thread(self._encoded, prompt) if isinstance(prompt, str) else tuple(prompt)

    async def attach(self, name: str) -> Model:
        """Answer to one more name. One that is attached already is reloaded."""
        if name in (_BASE, self.base):
            raise RegistryError(f"{name!r} is the base, which is always served", expected="the name of an adapter")
        parse_reference(name)
        return await self._alone(lambda: self._binding.attach(name))

    async def detach(self, name: str) -> None:
        """No longer answer to a name. Raises AdapterNotFound."""
        await self._alone(lambda: self._binding.detach(name))

    async def reload(self, name: str | None = None) -> list[Model]:
        """Look into the registry now, for one name or all. Raises what is wrong with a name that was named; of all,
        what is wrong with one is its `trouble`."""
        if name is not None:
            return [await self._alone(lambda: self._binding.renew(name))]
        for model in self._binding.names:
            with suppress(Exception):  # it is the model's trouble; AdapterNotFound: it was detached meanwhile
                await self._alone(partial(self._binding.renew, model.id))
        return self._binding.names.listed

    async def move(self, name: str, alias: str, version: str) -> list[Model]:
        """Point an alias at a version, in the registry and for the names that it answers to; the version is loaded
        first. Returns the models whose version changed."""
        check_alias(alias)
        return await self._alone(lambda: self._binding.move(name, alias, version))

    async def restore(self, name: str, alias: str, to: int | None = None) -> list[Model]:
        """Roll an alias back, as `Registry.restore` does, in the same way."""
        check_alias(alias)
        return await self._alone(lambda: self._binding.restore(name, alias, to))

    async def close(self) -> None:
        """Drain: take no more requests, finish those on their way within `spec.drain_seconds`."""
        self._closing = True
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.spec.drain_seconds
        with suppress(TimeoutError):  # the change that is being made meets a closed engine then
            async with asyncio.timeout_at(deadline), self._one_at_a_time:
                pass
        await self.engine.close(max(0.0, deadline - loop.time()))

    # ---- requests

    async def begin(self, version: Version | None, prompt: tuple[int, ...], like: Request) -> Answer:
        """Begin an answer of a version that was found, whatever its name means by now: any number to one prompt."""
        if like.max_new_tokens > (most_new := self.spec.max_new_tokens):
            raise ConfigError(
                [f"{like.max_new_tokens} new tokens are asked for: take at most {most_new}"], where="the request"
            )
        most = self.spec.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise ConfigError([f"the prompt has {len(prompt)} tokens: take at most {most}"], where="the request")
        draining = Draining("the server is shutting down", expected="a request before that")
        if self._closing:  # a change that is just made may keep the engine open for a while
            raise draining
        try:
            return await self.engine.begin(version, replace(like, prompt=prompt))
        except EngineBusy as error:
            raise draining if self._closing else error from None

    def _encoded(self, prompt: str) -> tuple[int, ...]:
        try:
            canonical_json(prompt)
        except ValueError as error:
            raise DataError(f"this cannot be asked: {error}", expected="text in UTF-8") from error
        return (*self.engine.tokenizer.bos, *self.engine.tokenizer.encode(prompt))

    async def _alone(self, change: Callable[[], Awaitable[T]]) -> T:
        """Make a change when no other is being made, and to its end."""

        async def alone() -> T:
            async with self._one_at_a_time:
                if self._closing:
                    raise Draining("the server is shutting down", expected="a change before that")
                return await change()

        task = asyncio.create_task(alone())
        self._changes.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have gone: asyncio would say that nobody looked at it

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.spec.follow_seconds)
            for name in await self._binding.news():
                with suppress(Exception):  # it is the model's trouble
                    await self._alone(partial(self._binding.renew, name))
