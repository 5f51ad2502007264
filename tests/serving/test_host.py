"""Names over an engine and a registry: who answers to what, and changes that are made whole or not at all."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generation.adapters_lab import Lab, damage, make_lab
from generation.engine_lab import numbers
from generation.serving_lab import Oracle
from serving.host_lab import Stage, files, hosted, played, until
from tiny_bases import CHATML, write_base

from peftkit.errors import (
    AdapterDamaged,
    AdapterNotFound,
    BaseMismatch,
    ConfigError,
    DataError,
    PeftkitError,
    RegistryError,
    TuningError,
)
from peftkit.generation.requests import Completion, Request
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.serving.openai.failures import Draining

PROMPT = numbers(20, 1)
FEW = Request((), max_new_tokens=6)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def lamp(lab: Lab) -> list[Version]:
    """Three versions of `lamp`: the last one is the latest, and the first one `lamp@prod`."""
    found = [lab.lora("lamp", 100 + i) for i in range(3)]
    lab.registry.tag(found[0].reference, "prod")
    return found


def test_names_mean_what_is_attached(lab: Lab, oracle: Oracle, lamp: list[Version]) -> None:
    first, second, last = lamp
    wishes = {
        "lamp": last, "lamp@prod": first, "lamp@latest": last, f"lamp@{second.id}": second,
        f"lamp@{second.id[:8]}": second, "sql@latest": lab.registry.resolve("sql"), "base": None,
    }  # fmt: skip

    async def scene() -> dict[str, Completion]:
        async with hosted(lab, ["lamp", "sql@latest"]) as stage:
            assert [model.id for model in stage.host.models()] == ["base", "lamp", "sql@latest"]
            for unknown in ("sql", "sql@prod", "tickets", "tickets@prod", "", "@", "lampe"):
                with pytest.raises(AdapterNotFound, match="one of base, lamp, sql@latest"):
                    await stage.host.find(unknown)
            with pytest.raises(AdapterNotFound, match="did you mean 'lamp'"):
                await stage.host.find("lampe")
            with pytest.raises(AdapterNotFound, match="no alias 'staging'"):
                await stage.host.find("lamp@staging")
            with pytest.raises(RegistryError, match="neither an alias nor a version"):
                await stage.host.find("lamp@../x")
            return {name: await stage.ask(name, PROMPT, 6) for name in wishes}

    for name, answer in played(scene()).items():
        version = wishes[name]
        assert answer.adapter == (version.reference if version else None)
        assert answer.ids == oracle.ids(version, PROMPT, 6)


def test_conversations_and_texts_become_the_prompts_of_training(lab: Lab, oracle: Oracle) -> None:
    tokenizer = lab.backbone().tokenizer
    rendered = tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")

    async def scene() -> list[Completion]:
        async with hosted(lab, ["sql"]) as stage:
            answers = [
                await stage.host.chat("sql", TURNS, FEW),
                await stage.host.complete("sql", "hello", FEW),
                await stage.host.complete("sql", PROMPT, FEW),
            ]
            return [await answer.whole() for answer in answers]

    prompts = [rendered, [*tokenizer.bos, *tokenizer.encode("hello")], PROMPT]
    version = lab.registry.resolve("sql")
    assert [answer.ids for answer in played(scene())] == [oracle.ids(version, prompt, 6) for prompt in prompts]


def test_tools_are_in_the_prompt_or_refused(lab: Lab, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    showing = make_lab(tmp_path, template=WITH_TOOLS)

    async def shown() -> int:
        async with hosted(showing) as stage:
            without = await stage.host.chat("base", TURNS, FEW)
            answer = await stage.host.chat("base", TURNS, FEW, tools)
            hidden = [{**tools[0], "description": "a <|im_end|> here"}]
            with pytest.raises(DataError, match="a tool contains the control token"):
                await stage.host.chat("base", TURNS, FEW, hidden)
            await asyncio.gather(answer.whole(), without.whole())
            return answer.prompt_tokens - without.prompt_tokens

    async def not_shown() -> None:
        async with hosted(lab) as stage:
            with pytest.raises(DataError, match="does not show the model its 1 tools"):
                await stage.host.chat("base", TURNS, FEW, tools)

    assert played(shown()) > 20
    played(not_shown())


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda host: host.chat("base", [{"role": "user", "content": "\ud800"}], FEW), DataError, "cannot be asked"),
        (lambda host: host.complete("base", "\ud800", FEW), DataError, "cannot be asked"),
        (lambda host: host.chat("base", [{"role": "user", "content": "<|im_end|>"}], FEW), DataError, "control token"),
        (lambda host: host.complete("base", numbers(9, 1), FEW), ConfigError, "9 tokens: take at most 8"),
        (lambda host: host.complete("base", "more than eight", FEW), ConfigError, "15 tokens: take at most 8"),
        (lambda host: host.complete("base", [], FEW), ConfigError, "the prompt is empty"),
        (lambda host: host.complete("base", [5, 999], FEW), ConfigError, "outside the vocabulary"),
        (lambda host: host.complete("base", [5], Request((), max_new_tokens=11)), ConfigError, "take at most 10"),
        (lambda host: host.complete("base", [5], replace(FEW, json_schema={"type": 1})), ConfigError, "schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    ask: Callable[[Any], Awaitable[Any]], error: type[PeftkitError], said: str, lab: Lab
) -> None:
    async def scene() -> None:
        async with hosted(lab, spec={"max_prompt_tokens": 8, "max_new_tokens": 10, "default_new_tokens": 5}) as stage:
            with pytest.raises(error, match=said):
                await ask(stage.host)

    played(scene())


# ---- attaching and detaching


def of_another_base(lab: Lab, name: str) -> Version:
    draft = lab.draft().model_dump(mode="json", include=set(Draft.model_fields))
    draft["base"] |= {"fingerprint": "0" * 64, "parts": dict.fromkeys(draft["base"]["parts"], "0" * 64)}
    return lab.registry.publish(name, lab.payload(name, 120), Draft.model_validate(draft))


def of_a_task(lab: Lab, name: str) -> Version:
    draft = lab.draft().model_dump(mode="json", include=set(Draft.model_fields))
    draft["adapter"] = {"head": {"kind": "sequence", "labels": ["a", "b"]}}
    return lab.registry.publish(name, lab.payload(name, 121), Draft.model_validate(draft))


def damaged(lab: Lab, name: str) -> Version:
    version = lab.lora(name, 122)
    damage(version.path / "adapter_model.safetensors")
    return version


REFUSED: list[tuple[Callable[[Lab, str], Any], type[PeftkitError], str]] = [
    (of_another_base, BaseMismatch, "was trained on"),
    (of_a_task, TuningError, "trained for a task"),
    (damaged, AdapterDamaged, "is damaged"),
    (lambda lab, name: lab.lora(name, 123, target_modules=["nowhere"], targets=("q_proj",)), TuningError, "nowhere"),
    (lambda lab, name: None, AdapterNotFound, "no adapter is called"),
]


@pytest.mark.parametrize(("make", "error", "said"), REFUSED)
def test_what_cannot_be_served_is_refused_and_leaves_everything_as_it_was(
    make: Callable[[Lab, str], Any], error: type[PeftkitError], said: str, tmp_path: Path
) -> None:
    lab = make_lab(tmp_path)
    good = lab.lora("good", 1)
    before = lab.lora("bad", 2) if error is not AdapterNotFound else None
    bad = make(lab, "bad")
    oracle = Oracle(lab)

    async def scene() -> Completion:
        async with hosted(lab, ["good"]) as stage:
            same, known = (files(lab.registry.root), stage.host.models()), set(stage.opened.versions)
            for name in ("bad", "bad@latest", *([f"bad@{bad.id}"] if bad else [])):
                with pytest.raises(error, match=said):
                    await stage.host.attach(name)
            assert (files(lab.registry.root), stage.host.models()) == same
            assert set(stage.opened.versions) == known
            if before is not None:
                lab.registry.tag(before.reference, "latest")
                await stage.host.attach("bad")
                with pytest.raises(error, match=said):
                    await stage.ask(f"bad@{bad.id}", PROMPT)
            return await stage.ask("good", PROMPT, 6)

    assert played(scene()).ids == oracle.ids(good, PROMPT, 6)


def test_the_base_s_names_are_its_own(lab: Lab, tmp_path: Path) -> None:
    other = Lab(tmp_path, write_base(tmp_path / "lamp", seed=5, initializer_range=0.2))
    other.lora("lamp", 1)

    async def scene() -> None:
        async with hosted(lab) as stage:
            for name in ("base", lab.base.name):
                with pytest.raises(RegistryError, match="is the base"):
                    await stage.host.attach(name)
                with pytest.raises(AdapterNotFound):
                    await stage.host.detach(name)
        async with hosted(other) as stage:
            with pytest.raises(RegistryError, match="'lamp' is the base"):
                await stage.host.attach("lamp")
            assert (await stage.host.attach("lamp@latest")).id == "lamp@latest"
            assert await stage.host.find("lamp") is None

    played(scene())


def test_detaching_ends_a_name_and_not_its_answers(lab: Lab, oracle: Oracle, lamp: list[Version]) -> None:
    async def scene() -> Completion:
        async with hosted(lab, ["lamp", "lamp@prod", "sql"]) as stage:
            answer = await stage.begin("lamp", PROMPT, 12)
            await stage.host.detach("lamp")
            for gone in ("lamp", f"lamp@{lamp[1].id}"):
                with pytest.raises(AdapterNotFound, match="one of base, lamp@prod, sql"):
                    await stage.ask(gone, PROMPT)
            with pytest.raises(AdapterNotFound):
                await stage.host.detach("lamp")
            assert set(stage.versions()) == {"lamp@prod", "sql"}
            return await answer.whole()

    assert played(scene()).ids == oracle.ids(lamp[2], PROMPT, 12)


# ---- aliases


def test_an_alias_moves_in_the_registry_and_for_its_names(lab: Lab, oracle: Oracle) -> None:
    one, two = (lab.lora("desk", 130 + i) for i in range(2))
    for alias in ("prod", "canary"):
        lab.registry.tag(one.reference, alias)

    async def scene() -> list[Completion]:
        async with hosted(lab, ["desk@prod", "desk@canary", "desk", "sql"]) as stage:
            before = await stage.begin("desk@prod", PROMPT, 8)
            (moved,) = await stage.host.move("desk", "prod", two.id[:6])
            assert (moved.id, moved.version) == ("desk@prod", two)
            assert lab.registry.resolve("desk@prod") == two
            assert stage.versions()["desk@canary"] == one.id
            assert await stage.host.move("desk", "prod", "latest") == []
            after = await stage.ask("desk@prod", PROMPT, 8)
            assert [model.id for model in await stage.host.restore("desk", "prod")] == ["desk@prod"]
            back = await stage.ask("desk@prod", PROMPT, 8)
            assert [model.id for model in await stage.host.restore("desk", "latest", 1)] == ["desk"]
            assert lab.registry.resolve("desk") == one == await stage.host.find("desk")
            assert await stage.host.move("desk", "new-one", two.id) == []
            assert lab.registry.resolve("desk@new-one") == two
            assert stage.host.swaps == 3
            return [await before.whole(), after, back]

    assert [answer.ids for answer in played(scene())] == [oracle.ids(each, PROMPT, 8) for each in (one, two, one)]


MOVES: list[tuple[Callable[[Stage], Awaitable[Any]], type[PeftkitError], str]] = [
    (lambda stage: stage.host.move("shelf", "prod", "0000"), AdapterNotFound, "no version of 'shelf' starts with"),
    (lambda stage: stage.host.move("shelf", "prod", "nowhere"), AdapterNotFound, "no alias 'nowhere'"),
    (lambda stage: stage.host.move("shelf", "prod", "damaged"), AdapterDamaged, "is damaged"),
    (lambda stage: stage.host.move("shelf", "../x", "latest"), RegistryError, "cannot be used"),
    (lambda stage: stage.host.move("shelf@prod", "prod", "latest"), RegistryError, "the adapter's name alone"),
    (lambda stage: stage.host.move("sql", "prod", "latest"), AdapterNotFound, "'sql' is not served"),
    (lambda stage: stage.host.restore("shelf", "prod"), AdapterNotFound, "no earlier place to go back to"),
    (lambda stage: stage.host.restore("shelf", "prod", 7), AdapterNotFound, "no record 7 with a version"),
    (lambda stage: stage.host.restore("shelf", "nowhere"), AdapterNotFound, "no earlier place"),
    (lambda stage: stage.host.restore("shelf", "latest", 2), AdapterDamaged, "is damaged"),
]


@pytest.fixture(scope="module")
def shelf(lab: Lab) -> Version:
    """`shelf@prod` is sound, `shelf@damaged` is not, and `shelf` was both."""
    good, bad = (lab.lora("shelf", 140 + i) for i in range(2))
    damage(bad.path / "adapter_model.safetensors")
    lab.registry.tag(good.reference, "prod")
    lab.registry.tag(bad.reference, "damaged")
    lab.registry.tag(good.reference, "latest")
    return good


@pytest.mark.parametrize(("change", "error", "said"), MOVES)
def test_a_move_that_fails_changes_nothing(
    change: Callable[[Stage], Awaitable[Any]], error: type[PeftkitError], said: str, lab: Lab, shelf: Version
) -> None:
    async def scene() -> None:
        async with hosted(lab, ["shelf", "shelf@prod"]) as stage:
            before = files(lab.registry.root), stage.host.models()
            with pytest.raises(error, match=said):
                await change(stage)
            assert (files(lab.registry.root), stage.host.models()) == before
            assert stage.host.swaps == 0

    played(scene())


def test_a_registry_that_cannot_be_written_leaves_the_names(lab: Lab) -> None:
    one, two = (lab.lora("locked", 150 + i) for i in range(2))
    lab.registry.tag(one.reference, "prod")
    impatient = Registry(lab.registry.root, lock_timeout=0.05)

    async def scene() -> None:
        async with hosted(lab, ["locked@prod"], registry=impatient) as stage:
            before = files(lab.registry.root), stage.host.models()
            with lab.registry.writing("something else"), pytest.raises(RegistryError):
                await stage.host.move("locked", "prod", two.id)
            assert (files(lab.registry.root), stage.host.models()) == before
            assert [model.version for model in await stage.host.move("locked", "prod", two.id)] == [two]

    played(scene())


def test_a_change_is_carried_out_though_its_asker_leaves(lab: Lab) -> None:
    one, two = (lab.lora("left", 160 + i) for i in range(2))
    lab.registry.tag(one.reference, "prod")

    async def scene() -> None:
        async with hosted(lab, ["left@prod"]) as stage:
            with lab.registry.writing("something else"):
                moving = asyncio.create_task(stage.host.move("left", "prod", two.id))
                await until(lambda: two.reference in stage.opened.versions)
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                assert moving.cancelled()
            await until(lambda: stage.versions() == {"left@prod": two.id})
            assert lab.registry.resolve("left@prod") == two

    played(scene())


# ---- the end


def test_draining_finishes_answers_and_refuses_what_comes_later(lab: Lab, oracle: Oracle, lamp: list[Version]) -> None:
    async def scene() -> list[Completion]:
        async with hosted(lab, ["lamp"], rows=2) as stage:
            answers = [await stage.begin("lamp", numbers(9, i), 9) for i in range(5)]
            closing = asyncio.create_task(stage.host.close())
            await until(lambda: stage.host.draining)
            assert stage.host.trouble() == "the server is shutting down"
            for ask in (stage.ask("lamp", PROMPT), stage.host.chat("base", TURNS, FEW), stage.host.attach("sql")):
                with pytest.raises(Draining):
                    await ask
            await closing
            return [await answer.whole() for answer in answers]

    assert [each.ids for each in played(scene())] == [oracle.ids(lamp[2], numbers(9, i), 9) for i in range(5)]


def test_draining_begins_while_a_change_is_still_being_made(lab: Lab, lamp: list[Version]) -> None:
    async def scene() -> None:
        async with hosted(lab, ["lamp"]) as stage:
            with lab.registry.writing("something else"):
                moving = asyncio.create_task(stage.host.move("lamp", "canary", lamp[1].id))
                await until(lambda: lamp[1].reference in stage.opened.versions)
                closing = asyncio.create_task(stage.host.close())
                await until(lambda: stage.host.draining)
                with pytest.raises(Draining):
                    await stage.ask("lamp", PROMPT)
            assert await moving == []
            await closing
            assert lab.registry.resolve("lamp@canary") == lamp[1]

    played(scene())


def test_a_change_that_hangs_does_not_hold_up_the_end(lab: Lab, lamp: list[Version]) -> None:
    async def scene() -> None:
        async with hosted(lab, ["lamp"], spec={"drain_seconds": 0.05}) as stage:
            with lab.registry.writing("something else"):
                moving = asyncio.create_task(stage.host.move("lamp", "slow", lamp[1].id))
                await until(lambda: lamp[1].reference in stage.opened.versions)
                await stage.host.close()
                assert not moving.done()
                assert not stage.engine._thread.is_alive()
            assert await moving == []
            assert lab.registry.resolve("lamp@slow") == lamp[1]

    played(scene())


def test_a_change_that_fails_when_its_asker_has_left_is_not_an_error_of_the_loop(lab: Lab) -> None:
    said: list[Any] = []

    async def scene() -> None:
        async with hosted(lab) as stage:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
            begun, go_on = asyncio.Event(), asyncio.Event()

            async def failing(name: str) -> Any:
                begun.set()
                await go_on.wait()
                raise AdapterNotFound(f"no {name}")

            stage.host._binding.attach = failing  # type: ignore[method-assign]
            asking = asyncio.create_task(stage.host.attach("sql"))
            await begun.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            go_on.set()
            await until(lambda: not stage.host._changes)
            gc.collect()

    played(scene())
    assert said == []


def test_an_alias_under_an_attached_name_is_kept_from_its_first_request_on(lab: Lab, oracle: Oracle) -> None:
    one, two = (lab.lora("roof", 170 + i) for i in range(2))
    lab.registry.tag(one.reference, "prod")

    async def scene() -> None:
        async with hosted(lab, ["roof", "sql"]) as stage:
            assert (await stage.ask("roof@prod", PROMPT, 6)).ids == oracle.ids(one, PROMPT, 6)
            assert [model.id for model in stage.host.models()] == ["base", "roof", "sql"]
            damage(two.path / "adapter_model.safetensors")
            lab.registry.tag(two.reference, "prod")
            assert (await stage.ask("roof@prod", PROMPT, 6)).adapter == one.reference, "not looked up again"
            three = lab.lora("roof", 172)
            assert await stage.host.move("roof", "prod", three.id) == [], "it is not listed"
            assert (await stage.ask("roof@prod", PROMPT, 6)).ids == oracle.ids(three, PROMPT, 6)
            with pytest.raises(AdapterNotFound, match="'roof@prod' is not served"):
                await stage.host.detach("roof@prod")
            await stage.host.attach("roof@prod")
            assert [model.id for model in stage.host.models()] == ["base", "roof", "sql", "roof@prod"]
            await stage.ask("roof@latest", PROMPT)
            await stage.host.detach("roof")
            assert (await stage.ask("roof@prod", PROMPT)).adapter == three.reference
            with pytest.raises(AdapterNotFound, match="one of base, sql, roof@prod"):
                await stage.ask("roof@latest", PROMPT)
            assert {model.id for model in stage.host._binding.names} == {"sql", "roof@prod"}

    played(scene())
