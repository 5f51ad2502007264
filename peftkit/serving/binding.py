"""Binding names to versions: what is to answer is loaded first, and a name that cannot change stays what it was."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from peftkit.errors import AdapterNotFound, PeftkitError
from peftkit.generation.answer import stopped
from peftkit.generation.opening import check_answers
from peftkit.registry.aliases import readable
from peftkit.registry.layout import check_name, parse_reference
from peftkit.registry.store import Registry, Version
from peftkit.serving.answering import Answering
from peftkit.serving.names import Model, Names

_SHOWN = 20
_LONGEST_PAUSE = 60
"""Looks into the registry between two tries of what was refused; one a second is the default."""


@dataclass
class Refused:
    """What a name was to answer with and could not."""

    reference: str | None
    """The version; None: the registry did not say one."""
    pause: int = 1
    looked: int = 0
    """How often the registry has said the same since."""


class Binding:
    """Attached names over an engine and a registry. Whoever changes them does so one change at a time."""

    def __init__(self, engine: Answering, registry: Registry) -> None:
        self.names = Names()
        self.swaps = 0
        """How often a name changed its version."""
        self._engine, self._registry = engine, registry
        self._refused: dict[str, Refused] = {}
        """Names in trouble: a change of the version is news at once, the same one after growing pauses."""

    def resolve(self, name: str) -> Version:
        """What the registry says of a name. Raises what it raises, and TuningError for an adapter of a task."""
        version = self._registry.resolve(name)
        check_answers([version])
        return version

    async def attach(self, name: str) -> Model:
        """Answer to one more name; one that is attached already is renewed."""
        if self.names.get(name) is not None:
            model = await self.renew(name)
            self.names.show(name, True)
            return model
        version = await asyncio.to_thread(self.resolve, name)
        await self._engine.prepare(version)
        return self.names.put(name, version)

    async def keep(self, name: str) -> Model:
        """Answer to an alias of an adapter that is attached, for as long as that is, without listing it."""
        if (known := self.names.get(name)) is not None:
            return known
        if not self.names.is_listed(parse_reference(name).name):
            raise self.unknown(name)
        model = await self.attach(name)
        self.names.show(name, False)
        return model

    async def detach(self, name: str) -> None:
        """No longer answer to a name."""
        if not self.names.is_listed(name):
            raise self.unknown(name)
        for model in self.names.remove(name):
            self._refused.pop(model.id, None)
            await self._forget(model.version)

    async def renew(self, name: str) -> Model:
        """Look into the registry for a name. Raises what is wrong, which is the model's trouble then."""
        self.served(name)
        tried = None
        try:
            version = await asyncio.to_thread(self.resolve, name)
            tried = version.reference
            await self._engine.prepare(version)
        except Exception as error:
            self.names.trouble(name, _why(error))
            before = self._refused.get(name)
            again = before is not None and before.reference == tried
            self._refused[name] = Refused(tried, min(2 * before.pause, _LONGEST_PAUSE) if before and again else 1)
            raise
        await self._bind([name], version)
        return self.served(name)

    async def move(self, name: str, alias: str, version: str) -> list[Model]:
        """Point an alias at a version; returns the models that this changes."""
        self._check_served(name)
        wanted = await asyncio.to_thread(self.resolve, f"{name}@{version}")
        return await self._moved(alias, wanted, lambda: self._registry.tag(wanted.reference, alias))

    async def restore(self, name: str, alias: str, to: int | None) -> list[Model]:
        """Roll an alias back; returns the models that this changes."""
        self._check_served(name)
        wanted, number = await asyncio.to_thread(self._earlier, name, alias, to)
        return await self._moved(alias, wanted, lambda: self._registry.restore(name, alias, to=number))

    async def news(self) -> list[str]:
        """Names of which the registry says something that it did not say before, or whose time it is to try again."""
        names = [model.id for model in self.names]
        found = await asyncio.to_thread(lambda: {name: self._looked_up(name) for name in names})
        return [name for name in names if self._is_news(name, found[name])]

    def served(self, name: str) -> Model:
        """An attached name. Raises AdapterNotFound."""
        model = self.names.get(name)
        if model is None:
            raise self.unknown(name)
        return model

    def unknown(self, name: str) -> AdapterNotFound:
        """The error for a name that is not served."""
        served = [self._engine.base, *(model.id for model in self.names.listed)]
        near = difflib.get_close_matches(name, served, n=1)
        return AdapterNotFound(
            f"{name!r} is not served" + (f"; did you mean {near[0]!r}?" if near else ""),
            expected=f"one of {', '.join(served[:_SHOWN])}" + (" …" if len(served) > _SHOWN else ""),
            hint="POST /v1/adapters attaches an adapter of the registry",
        )

    async def _moved(self, alias: str, version: Version, write: Callable[[], Version]) -> list[Model]:
        """Load a version, write into the registry, let the alias's names answer with it."""
        try:
            await self._engine.prepare(version)
            await asyncio.to_thread(write)
            changed = await self._bind(self.names.following(version.name, alias), version)
            return [model for model in changed if self.names.is_listed(model.id)]
        finally:
            await self._forget(version)  # unless a name answers with it now, or did before

    async def _bind(self, names: Sequence[str], version: Version) -> list[Model]:
        """Let names answer with a version that is loaded; returns those whose version this changes."""
        changed, before = [], []
        for name in names:
            old, new = self.served(name), self.names.put(name, version)
            self._refused.pop(name, None)
            if not old.answers_with(version):
                changed.append(new)
                before.append(old.version)
        self.swaps += len(changed)
        for each in before:
            await self._forget(each)
        return changed

    async def _forget(self, version: Version | None) -> None:
        if version is not None and not self.names.answered_by(version):
            with suppress(PeftkitError):  # the change stands; what the engine cannot let go makes room later
                await self._engine.forget(version)

    def _check_served(self, name: str) -> None:
        check_name(name)
        if not self.names.of(name):
            raise self.unknown(name)

    def _earlier(self, name: str, alias: str, to: int | None) -> tuple[Version, int]:
        """The version that an alias goes back to, and the number of the record which says so."""
        moves = readable(self._registry.layout, name, alias)
        number = to if to is not None else moves[-2].number if len(moves) > 1 else 0
        found = next((move.version for move in moves if move.number == number), None)
        if found is None:
            what = "no earlier place to go back to" if to is None else f"no record {to} with a version"
            numbers = ", ".join(str(move.number) for move in moves if move.version is not None) or "none"
            raise AdapterNotFound(f"{name}@{alias} has {what}", expected=f"a record number of it: {numbers}")
        version = self._registry.load(name, found)
        check_answers([version])
        return version, number

    def _looked_up(self, name: str) -> Version | str:
        """What the registry says, or what is wrong with that."""
        try:
            return self.resolve(name)
        except Exception as error:
            return _why(error)

    def _is_news(self, name: str, found: Version | str) -> bool:
        model = self.names.get(name)
        if model is None:
            return False
        if isinstance(found, str):
            return model.trouble != found
        if model.answers_with(found) and model.trouble is None:
            return False
        refused = self._refused.get(name)
        if refused is None or refused.reference != found.reference:
            return True
        refused.looked += 1
        return refused.looked >= refused.pause


def _why(error: Exception) -> str:
    return error.fact if isinstance(error, PeftkitError) else stopped(error).fact
