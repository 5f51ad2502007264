"""Which names are answered, and by which versions: a name changes hands whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.generation.requests import Request
from peftkit.registry.store import Registry, Version
from peftkit.serving.answering import Answer, Answering
from peftkit.serving.spec import ServeSpec


@dataclass(frozen=True)
class Model:
    """A name that may be asked for."""

    id: str
    """`tickets`, `sql@prod`; the base has its source's name."""
    version: Version | None
    """What answers now; None is the base."""
    since: float
    """When it became that: seconds since 1970."""
    trouble: str | None = None
    """Why it is not what the registry says now; None when it is."""


class Host:
    """Names over an engine and a registry.

    All methods are called from one event loop. A change is prepared in the engine first and then takes effect between
    two requests: whoever was asked before ends on the version that it began with, and when anything goes wrong, names
    and registry are as they were.
    """

    def __init__(self, engine: Answering, registry: Registry, spec: ServeSpec) -> None: ...

    async def start(self, names: Sequence[str]) -> None:
        """Attach the first names and begin to follow the registry. Raises what `attach` raises."""

    def models(self) -> list[Model]:
        """The base first, then the attached names in their order."""

    async def find(self, model: str) -> Version | None:
        """What answers to a request's `model` now. The base is `base` or its source's name. An attached `tickets`
        answers for `tickets@alias` and `tickets@version` too; an attached `sql@prod` for `sql@prod` alone.

        Raises AdapterNotFound, naming what is served.
        """

    async def chat(
        self, model: str, turns: Sequence[Mapping[str, Any]], like: Request, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Answer:
        """Begin the next turn of a conversation, rendered as the adapter's training rendered its rows."""

    async def complete(self, model: str, prompt: str | Sequence[int], like: Request) -> Answer:
        """Begin to go on with a text (with the tokenizer's BOS before it) or with token ids."""

    async def attach(self, name: str) -> Model:
        """Answer to one more name. One that is attached already is reloaded."""

    async def detach(self, name: str) -> None:
        """No longer answer to a name. Raises AdapterNotFound."""

    async def reload(self, name: str | None = None) -> list[Model]:
        """Look into the registry now, for one name or all. Raises what is wrong with a name that was named; of all,
        what is wrong with one is its `trouble`."""

    async def move(self, name: str, alias: str, version: str) -> list[Model]:
        """Point an alias at a version, in the registry and for the names that it answers to; the version is loaded
        first. Returns the models whose version changed."""

    async def restore(self, name: str, alias: str, to: int | None = None) -> list[Model]:
        """Roll an alias back, as `Registry.restore` does, in the same way."""

    async def close(self) -> None:
        """Drain: take no more requests, finish those on their way within `spec.drain_seconds`."""
