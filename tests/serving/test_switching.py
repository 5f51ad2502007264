"""Names that change hands while many ask: every answer is one version's, and of one that its name meant meanwhile."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from generation.adapters_lab import Lab, damage
from generation.engine_lab import numbers
from generation.serving_lab import Oracle, check_seats
from serving.host_lab import Stage, hosted, played, until

from peftkit.errors import AdapterDamaged, AdapterNotFound, PeftkitError
from peftkit.generation.requests import Completion
from peftkit.registry import aliases
from peftkit.registry.store import Registry, Version

NAMES = ("alpha", "beta", "gamma")
PROMPTS = [tuple(numbers(6 + 5 * i, i)) for i in range(3)]
NEW = 5
CHANGES = ("move", "move", "tag", "publish", "restore", "detach", "attach", "attach", "reload", "damaged", "wrong")
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Asked:
    """One answer, with what its name could have meant from when it was asked until its first piece came."""

    model: str
    prompt: tuple[int, ...]
    answer: Completion
    meant: set[str | None]


@dataclass
class Watched:
    """Which versions were bound to each name, in their order: what is appended is bound from then on."""

    stage: Stage
    bound: dict[str, list[str | None]] = field(default_factory=dict)

    def look(self) -> None:
        names = self.stage.host._binding.names  # with those that answer because `alpha` is attached
        known = {model.id: model.version.id for model in names if model.version}
        for name in {*self.bound, *known}:
            history = self.bound.setdefault(name, [])
            if not history or history[-1] != known.get(name):
                history.append(known.get(name))


def watch(stage: Stage) -> Watched:
    """Every change of a name goes through `Names`, so that none is missed."""
    watched, names = Watched(stage), stage.host._binding.names
    put, remove = names.put, names.remove

    def noted_put(name: str, version: Version) -> object:
        model = put(name, version)
        watched.look()
        return model

    def noted_remove(name: str) -> object:
        gone = remove(name)
        watched.look()
        return gone

    names.put, names.remove = noted_put, noted_remove  # type: ignore[method-assign,assignment]
    watched.look()
    return watched


async def ask(stage: Stage, watched: Watched, model: str, prompt: tuple[int, ...], leave: bool) -> Asked | None:
    """Ask once; None when the name was not served, or the asker left."""
    before, record = len(watched.bound.get(model, [None])) - 1, last_record(stage, model)
    try:
        answer = await stage.begin(model, prompt, NEW)
        await anext(answer.pieces(), "")
    except (AdapterNotFound, AdapterDamaged):  # nobody answers to it, or only the name before its @
        assert model != "base"
        assert None in watched.bound[model][before:]
        return None
    meant = {None} if model == "base" else set(watched.bound[model][before:])
    if model != "base" and None in meant:  # the registry was asked what the alias of an attached name is
        meant |= records(stage, model, record)
    if leave:
        answer.cancel()
    whole = await answer.whole()
    return None if leave else Asked(model, prompt, whole, meant)


def last_record(stage: Stage, model: str) -> int:
    name, _, alias = model.partition("@")
    return max(aliases.numbers(stage.host.registry.layout, name, alias), default=0) if alias else 0


def records(stage: Stage, model: str, since: int) -> set[str | None]:
    """Where an alias has pointed since a record of it."""
    name, _, alias = model.partition("@")
    layout, numbers = stage.host.registry.layout, range(since, last_record(stage, model) + 1)
    return {aliases.read(layout, name, alias, number).version for number in numbers} if alias else set()


async def load(stage: Stage, watched: Watched, found: list[Asked], seed: int, stop: asyncio.Event) -> None:
    draw = random.Random(seed)
    while not stop.is_set():
        model = draw.choice((*NAMES, *(f"{name}@prod" for name in NAMES), "base"))
        asked = await ask(stage, watched, model, draw.choice(PROMPTS), draw.random() < 0.15)
        if asked is not None:
            found.append(asked)
        else:
            await asyncio.sleep(0)


class Changes:
    """Somebody who changes what is served, through the host and through a registry of their own."""

    def __init__(self, stage: Stage, lab: Lab, payloads: int) -> None:
        self.stage, self.lab, self.payloads = stage, lab, payloads
        self.elsewhere = Registry(lab.registry.root)
        self.good: dict[str, list[Version]] = {name: lab.registry.versions(name) for name in NAMES}
        self.done: dict[str, int] = {}

    async def one(self, change: str, draw: random.Random) -> None:
        name = draw.choice(NAMES)
        model = draw.choice((name, f"{name}@prod"))
        try:
            await getattr(self, change)(draw, name, model)
        except PeftkitError:
            change = f"{change} refused"
        self.done[change] = self.done.get(change, 0) + 1

    async def move(self, draw: random.Random, name: str, model: str) -> None:
        version = draw.choice(self.good[name])
        await self.stage.host.move(name, "prod", version.id)

    async def tag(self, draw: random.Random, name: str, model: str) -> None:
        reference = draw.choice(self.good[name]).reference
        await asyncio.to_thread(self.elsewhere.tag, reference, draw.choice(("prod", "latest")))

    async def publish(self, draw: random.Random, name: str, model: str) -> None:
        seed = 300 + 10 * NAMES.index(name) + draw.randrange(self.payloads)
        payload = self.lab.payload(f"{name}-{seed}", seed)
        version = await asyncio.to_thread(self.elsewhere.publish, name, payload, self.lab.draft(), ["prod"])
        if version.id not in {each.id for each in self.good[name]}:
            self.good[name].append(version)

    async def restore(self, draw: random.Random, name: str, model: str) -> None:
        await self.stage.host.restore(name, draw.choice(("prod", "latest")))

    async def detach(self, draw: random.Random, name: str, model: str) -> None:
        await self.stage.host.detach(model)

    async def attach(self, draw: random.Random, name: str, model: str) -> None:
        await self.stage.host.attach(model)

    async def reload(self, draw: random.Random, name: str, model: str) -> None:
        await self.stage.host.reload(draw.choice((model, None)))

    async def damaged(self, draw: random.Random, name: str, model: str) -> None:
        """A damaged version takes over the alias for a while; it must never answer."""
        reference = f"{name}@{self.lab.registry.aliases(name)['damaged']}"
        await asyncio.to_thread(self.elsewhere.tag, reference, "prod")
        await asyncio.sleep(0.03)
        await asyncio.to_thread(self.elsewhere.tag, self.good[name][0].reference, "prod")

    async def wrong(self, draw: random.Random, name: str, model: str) -> None:
        """A move that must fail and change nothing."""
        before = self.lab.registry.history(name, "prod")
        with pytest.raises(PeftkitError):
            await self.stage.host.move(name, "prod", "damaged")
        assert self.lab.registry.history(name, "prod") == before


def served(lab: Lab, payloads: int) -> None:
    """Two sound versions of each name and a damaged one."""
    for i, name in enumerate(NAMES):
        first = lab.lora(name, 300 + 10 * i)
        bad = lab.lora(name, 399 - i)
        damage(bad.path / WEIGHTS)
        lab.registry.tag(bad.reference, "damaged")
        lab.registry.tag(first.reference, "prod")
        lab.lora(name, 301 + 10 * i)


def switched(lab: Lab, oracle: Oracle, *, askers: int, rounds: int, seed: int, payloads: int = 4) -> None:
    found: list[Asked] = []
    made: dict[str, int] = {}

    async def scene() -> dict[str, set[str | None]]:
        names = [*NAMES, *(f"{name}@prod" for name in NAMES)]
        async with hosted(lab, names, slots=2, rows=6, spec={"follow_seconds": 0.02}) as stage:
            watched, stop = watch(stage), asyncio.Event()
            asking = [asyncio.create_task(load(stage, watched, found, 1000 * seed + i, stop)) for i in range(askers)]
            changing, draw = Changes(stage, lab, payloads), random.Random(seed)
            for change in draw.sample(CHANGES * rounds, len(CHANGES) * rounds):
                target = len(found) + 2
                await changing.one(change, draw)
                await until(lambda target=target: len(found) >= target or any(task.done() for task in asking))
            stop.set()
            await asyncio.gather(*asking)
            made.update(changing.done)
            await stage.idle()
            check_seats(stage.opened.engine, stage.opened.fleet)
            return {name: set(history) for name, history in watched.bound.items()}

    bound = played(scene())
    broken = {lab.registry.aliases(name)["damaged"] for name in NAMES}
    assert not broken & {version for versions in bound.values() for version in versions}
    versions = {version.reference: version for name in NAMES for version in lab.registry.versions(name)}
    for asked in found:
        version = versions[asked.answer.adapter] if asked.answer.adapter else None
        assert (version.id if version else None) in asked.meant, asked.model
        assert asked.answer.ids == oracle.ids(version, asked.prompt, NEW), asked.model
    assert len({asked.answer.adapter for asked in found}) >= 6
    assert len(found) >= 2 * rounds * len(CHANGES)
    assert {"move", "tag", "publish", "damaged", "wrong", "detach"} <= made.keys(), made


def test_names_change_hands_under_load(lab: Lab, oracle: Oracle) -> None:
    served(lab, 4)
    switched(lab, oracle, askers=8, rounds=2, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 8))
def test_names_change_hands_under_load_for_long(seed: int, lab: Lab, oracle: Oracle) -> None:
    served(lab, 4)
    switched(lab, oracle, askers=40, rounds=15, seed=seed)
