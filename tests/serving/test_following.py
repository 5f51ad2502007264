"""What other processes do to the registry, a server takes up by itself; what it cannot is trouble, told once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys

import pytest
from generation.adapters_lab import Lab, damage
from generation.engine_lab import numbers
from generation.serving_lab import Oracle
from serving.host_lab import Stage, hosted, played, until

from peftkit.errors import AdapterDamaged, AdapterNotFound
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.serving.binding import Binding

PROMPT = numbers(20, 1)
OFTEN = {"follow_seconds": 0.02}
WEIGHTS = "adapter_model.safetensors"


def trouble_of(stage: Stage, name: str) -> str | None:
    return next(model.trouble for model in stage.host.models() if model.id == name)


async def looked(stage: Stage, times: int = 2) -> None:
    """Wait until the host has looked into the registry so often again."""
    binding, seen = stage.host._binding, 0
    news = Binding.news

    async def counted() -> list[str]:
        nonlocal seen
        found = await news(binding)
        seen += 1
        return found

    binding.news = counted  # type: ignore[method-assign]
    await until(lambda: seen > times)
    del binding.news  # type: ignore[method-assign]


ELSEWHERE = """
import json, sys
from pathlib import Path
from peftkit.registry.store import Draft, Registry
root, name, payload, draft, alias = json.loads(sys.argv[1])
Registry(Path(root)).publish(name, Path(payload), Draft.model_validate(draft), [alias])
"""


def test_what_another_process_publishes_is_answered_from_then_on(lab: Lab, oracle: Oracle) -> None:
    old = lab.lora("followed", 200)
    lab.registry.tag(old.reference, "prod")
    payload = lab.payload("followed-new", 201)
    draft = lab.draft().model_dump(mode="json", include=set(Draft.model_fields))

    async def scene() -> tuple[Version, list[int], list[int]]:
        async with hosted(lab, ["followed", "followed@prod", f"followed@{old.id}", "sql"], spec=OFTEN) as stage:
            before = await stage.begin("followed", PROMPT, 15)
            given = json.dumps([str(lab.registry.root), "followed", str(payload), draft, "prod"])
            other = await asyncio.create_subprocess_exec(sys.executable, "-c", ELSEWHERE, given)
            await until(lambda: stage.versions()["followed"] != old.id and stage.versions()["followed@prod"] != old.id)
            assert await other.wait() == 0
            new = lab.registry.resolve("followed")
            assert stage.versions() == {
                "followed": new.id, "followed@prod": new.id, f"followed@{old.id}": old.id,
                "sql": lab.registry.resolve("sql").id,
            }  # fmt: skip
            assert stage.host.swaps == 2
            return new, (await before.whole()).ids, (await stage.ask("followed@prod", PROMPT, 6)).ids

    new, before, after = played(scene())
    assert before == oracle.ids(old, PROMPT, 15)
    assert after == oracle.ids(new, PROMPT, 6)


def test_a_damaged_version_is_trouble_and_the_old_one_answers(lab: Lab, oracle: Oracle) -> None:
    good = lab.lora("shaky", 210)
    tries: list[str] = []

    async def scene() -> list[list[int]]:
        async with hosted(lab, ["shaky"], spec=OFTEN) as stage:
            prepare = stage.engine.prepare

            async def noted(version: Version) -> None:
                tries.append(version.id)
                await prepare(version)

            stage.engine.prepare = noted  # type: ignore[method-assign]
            content = damage_before_publishing(lab, "shaky", 211)
            await until(lambda: trouble_of(stage, "shaky") is not None)
            bad = lab.registry.resolve("shaky")
            answers = [(await stage.ask("shaky", PROMPT, 6)).ids]
            with pytest.raises(AdapterDamaged):
                await stage.host.reload("shaky")
            assert [model.id for model in await stage.host.reload()] == ["shaky"]
            assert set(tries) == {bad.id}
            assert len(tries) >= 3
            assert stage.versions() == {"shaky": good.id}
            (bad.path / WEIGHTS).write_bytes(content)
            (model,) = await stage.host.reload("shaky")
            assert (model.version, model.trouble) == (bad, None)
            answers.append((await stage.ask("shaky", PROMPT, 6)).ids)
            lab.registry.tag(good.reference, "latest")
            await until(lambda: stage.versions() == {"shaky": good.id})
            assert stage.host.swaps == 2
            return answers

    found = played(scene())
    assert found == [oracle.ids(good, PROMPT, 6), oracle.ids(lab.registry.versions("shaky")[0], PROMPT, 6)]


def damage_before_publishing(lab: Lab, name: str, seed: int) -> bytes:
    """Publish a version whose weights are damaged before its alias moves; returns the weights."""
    version = Registry(lab.folder / "aside").publish(name, lab.payload(f"{name}-{seed}", seed), lab.draft())
    content = damage(version.path / WEIGHTS)
    with lab.registry.writing("publish a damaged version"):
        version.path.rename(lab.registry.layout.version(name, version.id))
    lab.registry.tag(f"{name}@{version.id}", "latest")
    return content


def test_a_name_that_the_registry_loses_answers_until_it_is_detached(lab: Lab, oracle: Oracle) -> None:
    version = lab.lora("lost", 220)
    known = oracle.ids(version, PROMPT, 6)
    folder = lab.registry.layout.adapter("lost")

    async def scene() -> None:
        async with hosted(lab, ["lost", "sql"], spec=OFTEN) as stage:
            folder.rename(lab.folder / "lost-and-found")
            await until(lambda: trouble_of(stage, "lost") is not None)
            assert "no adapter is called 'lost'" in str(trouble_of(stage, "lost"))
            assert trouble_of(stage, "sql") is None
            assert (await stage.ask("lost", PROMPT, 6)).ids == known
            with pytest.raises(AdapterNotFound):
                await stage.host.reload("lost")
            (lab.folder / "lost-and-found").rename(folder)
            await until(lambda: trouble_of(stage, "lost") is None)
            folder.rename(lab.folder / "lost-and-found")
            await until(lambda: trouble_of(stage, "lost") is not None)
            await stage.host.detach("lost")
            with pytest.raises(AdapterNotFound, match="is not served"):
                await stage.ask("lost", PROMPT)
            (lab.folder / "lost-and-found").rename(folder)

    played(scene())


def test_without_following_a_name_changes_when_it_is_reloaded(lab: Lab) -> None:
    old = lab.lora("steady", 230)

    async def scene() -> None:
        async with hosted(lab, ["steady"]) as stage:
            new = lab.lora("steady", 231)
            assert stage.versions() == {"steady": old.id}
            assert stage.host._following is None
            since = stage.host.models()[1].since
            (model,) = await stage.host.reload()
            assert model.version == new
            assert model.since > since
            assert await stage.host.reload("steady") == [model]
            assert await stage.host.attach("steady") == model
            with pytest.raises(AdapterNotFound, match="is not served"):
                await stage.host.reload("other")

    played(scene())


def test_following_goes_on_whatever_goes_wrong_with_one_name(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.lora("sound", 240)
    lab.lora("unlucky", 241)
    resolve = Registry.resolve

    def broken(self: Registry, reference: str) -> Version:
        if reference == "unlucky":
            raise OSError(5, "Input/output error")
        return resolve(self, reference)

    async def scene() -> None:
        async with hosted(lab, ["unlucky", "sound"], spec=OFTEN) as stage:
            with monkeypatch.context() as patched:
                patched.setattr(Registry, "resolve", broken)
                await until(lambda: "Input/output error" in str(trouble_of(stage, "unlucky")))
                new = lab.lora("sound", 242)
                await until(lambda: stage.versions()["sound"] == new.id)
            await until(lambda: trouble_of(stage, "unlucky") is None)

    played(scene())


def test_what_was_refused_is_tried_again_after_growing_pauses(lab: Lab) -> None:
    lab.lora("healing", 250)
    tries: list[int] = []
    looks: list[list[str]] = []

    async def scene() -> None:
        async with hosted(lab, ["healing", "sql"]) as stage:
            binding, prepare, away = stage.host._binding, stage.engine.prepare, True

            async def unlucky(version: Version) -> None:
                tries.append(len(looks))
                if away:
                    raise OSError(28, "No space left on device")
                await prepare(version)

            stage.engine.prepare = unlucky  # type: ignore[method-assign]
            new = lab.lora("healing", 251)
            for _ in range(300):
                looks.append(await binding.news())
                for name in looks[-1]:
                    with contextlib.suppress(OSError):
                        await binding.renew(name)
            assert tries[:8] == [1, 2, 4, 8, 16, 32, 64, 124]
            assert [after - before for before, after in itertools.pairwise(tries[7:])] == [60] * len(tries[8:])
            assert "No space left" in str(trouble_of(stage, "healing"))
            newest = lab.lora("healing", 252)
            assert await binding.news() == ["healing"], "another version is tried at once"
            lab.registry.tag(new.reference, "latest")
            away = False
            for _ in range(60):
                for name in await binding.news():
                    await binding.renew(name)
            assert stage.versions()["healing"] == new.id != newest.id
            assert trouble_of(stage, "healing") is None
            assert await binding.news() == []

    played(scene())


def test_a_file_that_is_repaired_heals_by_itself(lab: Lab) -> None:
    lab.lora("mended", 260)

    async def scene() -> None:
        async with hosted(lab, ["mended"], spec=OFTEN) as stage:
            content = damage_before_publishing(lab, "mended", 261)
            await until(lambda: trouble_of(stage, "mended") is not None)
            bad = lab.registry.resolve("mended")
            (bad.path / WEIGHTS).write_bytes(content)
            await until(lambda: stage.versions() == {"mended": bad.id})
            assert trouble_of(stage, "mended") is None

    played(scene())


def test_an_alias_that_was_asked_is_followed_as_its_name_is(lab: Lab, oracle: Oracle) -> None:
    good = lab.lora("shade", 270)

    async def scene() -> None:
        async with hosted(lab, ["shade"], spec=OFTEN) as stage:
            assert (await stage.ask("shade@latest", PROMPT, 6)).ids == oracle.ids(good, PROMPT, 6)
            content = damage_before_publishing(lab, "shade", 271)
            await until(lambda: trouble_of(stage, "shade") is not None)
            bad = lab.registry.resolve("shade")
            for model in ("shade", "shade@latest"):
                assert (await stage.ask(model, PROMPT, 6)).adapter == good.reference
            (bad.path / WEIGHTS).write_bytes(content)
            await until(lambda: all(model.version == bad for model in stage.host._binding.names))
            assert (await stage.ask("shade@latest", PROMPT, 6)).ids == oracle.ids(bad, PROMPT, 6)
            assert [model.id for model in stage.host.models()] == ["base", "shade"]

    played(scene())
