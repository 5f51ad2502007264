"""A host over an engine of its own with little room, without HTTP; asked and changed in one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from generation.adapters_lab import Lab
from generation.serving_lab import check_seats, rows_of

from peftkit.backbone.load import Backbone
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.limits import Limits
from peftkit.generation.opening import Opened, engine_over
from peftkit.generation.requests import Completion, Request
from peftkit.registry.store import Registry, Version
from peftkit.serving.answering import Answer
from peftkit.serving.host import Host
from peftkit.serving.local import LocalEngine
from peftkit.serving.spec import ServeSpec

SECONDS = 60.0
"""For anything that is waited for."""
T = TypeVar("T")


@dataclass
class Stage:
    """A host, and what lies beneath it."""

    lab: Lab
    opened: Opened
    engine: LocalEngine
    host: Host

    async def begin(self, model: str, prompt: Sequence[int], new: int = 8, **wishes: Any) -> Answer:
        return await self.host.complete(model, prompt, Request((), max_new_tokens=new, **wishes))

    async def ask(self, model: str, prompt: Sequence[int], new: int = 8, **wishes: Any) -> Completion:
        return await (await self.begin(model, prompt, new, **wishes)).whole()

    def versions(self) -> dict[str, str]:
        """What answers to which name."""
        return {model.id: model.version.id for model in self.host.models() if model.version is not None}

    async def idle(self) -> None:
        """Nobody is answered, and nothing is held for anybody."""
        await until(lambda: not self.opened.engine.running and not self.opened.engine.waiting)
        await until(lambda: not any(resident.users for resident in self.opened.fleet._residents.values()))
        check_seats(self.opened.engine, self.opened.fleet)
        assert not rows_of(self.opened.engine)
        await until(lambda: not self.engine._on_way and not self.engine._beginning)


def played(scene: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; one that hangs fails."""

    async def timed() -> T:
        async with asyncio.timeout(SECONDS):
            return await scene

    return asyncio.run(timed())


def bound(host: Host) -> set[str]:
    """The versions that names answer with."""
    return {model.version.reference for model in host._binding.names if model.version}


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another thread or task brings about."""
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.002)


def opened_over(
    lab: Lab, backbone: Backbone | None = None, *, slots: int = 3, rows: int = 6, waiting: int | None = None
) -> Opened:
    """An engine over a backbone that the oracle does not use meanwhile."""
    versions: dict[str, Version] = {}
    fleet = Fleet(backbone or lab.fresh(), versions.__getitem__, slots=slots)
    engine = engine_over(fleet, Limits(rows=rows, waiting=waiting, cache_bytes=1 << 28))
    return Opened(fleet.backbone, fleet, engine, None, versions)


@asynccontextmanager
async def hosted(
    lab: Lab, names: Sequence[str] = (), *, registry: Registry | None = None, spec: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Stage]:  # fmt: skip
    """A host that has started; once it is closed, nothing is left of it."""
    opened = opened_over(lab, **settings)
    engine = LocalEngine(opened)
    host = Host(engine, registry or lab.registry, ServeSpec.model_validate({"follow_seconds": 0, **(spec or {})}))
    stage = Stage(lab, opened, engine, host)
    engine.start()
    try:
        await host.start(names)
        yield stage
        await stage.idle()
        await until(lambda: set(opened.versions) == bound(host))  # a look into the registry may just be under way
    finally:
        async with asyncio.timeout(SECONDS):
            await host.close()
    assert not engine._thread.is_alive()
    assert not opened.fleet.statistics().resident
    assert opened.fleet.bank.bytes == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "peftkit-engine" and thread.is_alive()]


def files(root: Path) -> dict[str, bytes]:
    """All that a registry holds; the lock's file says nothing."""
    found = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}
