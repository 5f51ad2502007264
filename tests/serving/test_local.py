"""The engine behind the server: its thread, what the event loop hears of it, and what is left when all have gone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from functools import partial
from typing import Any

import pytest
import torch
from generation.adapters_lab import Lab, damage
from generation.engine_lab import numbers
from generation.serving_lab import Oracle
from serving.host_lab import hosted, opened_over, played, until

from peftkit.errors import AdapterDamaged, BaseError, ConfigError, EngineBusy, GenerationError
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.opening import find_base, open_engine
from peftkit.generation.requests import Completion, Request
from peftkit.generation.running import Ticket
from peftkit.generation.seats import Seat
from peftkit.registry.store import Version
from peftkit.serving.local import LocalEngine
from peftkit.serving.local_answer import LocalAnswer

PROMPT = numbers(20, 1)


@pytest.fixture(scope="module")
def three(lab: Lab) -> dict[str, Version]:
    return {name: lab.lora(name, 40 + i) for i, name in enumerate(("one", "two", "three"))}


def _hold(held: threading.Event, until: threading.Event) -> None:
    held.set()
    until.wait()


def live_bytes() -> int:
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_pieces_are_the_text_and_the_answer_is_its_versions(
    lab: Lab, oracle: Oracle, three: dict[str, Version]
) -> None:
    wishes = [(name, numbers(3 + 5 * i, i), 2 + i % 7) for i, name in enumerate([*three, "base"] * 3)]

    async def one(stage: Any, name: str, prompt: list[int], new: int) -> Completion:
        answer = await stage.begin(name, prompt, new)
        said = "".join([piece async for piece in answer.pieces()])
        whole: Completion = await answer.whole()
        assert said == whole.text
        assert answer.prompt_tokens == len(prompt)
        assert answer.reference == whole.adapter == (three[name].reference if name in three else None)
        return whole

    async def scene() -> list[Completion]:
        async with hosted(lab, [*three], slots=2) as stage:
            return await asyncio.gather(*(one(stage, *wish) for wish in wishes))

    for (name, prompt, new), answer in zip(wishes, played(scene()), strict=True):
        assert answer.ids == oracle.ids(three.get(name), prompt, new)


def test_no_piece_is_lost_between_the_thread_that_writes_and_the_loop_that_begins_to_listen() -> None:
    draw = random.Random(3)

    async def scene() -> None:
        for _ in range(300):
            ticket, ended = Ticket(Request((1,)), None), list[LocalAnswer]()
            written = [f"{i} " for i in range(draw.randrange(5))]

            def write(ticket: Ticket = ticket, written: list[str] = written) -> None:
                for piece in written:
                    ticket.push(piece)
                ticket.close(Completion("".join(written), [], stopped=True))

            thread = threading.Thread(target=write)
            thread.start()
            if draw.random() < 0.5:
                await asyncio.sleep(0)
            answer = LocalAnswer(ticket, ended.append)
            assert "".join([piece async for piece in answer.pieces()]) == "".join(written)
            assert (await answer.whole()).text == "".join(written)
            thread.join()
            assert ended == [answer]

    played(scene())


def test_the_thread_sleeps_while_there_is_nothing_to_do(lab: Lab, three: dict[str, Version]) -> None:
    async def scene() -> None:
        async with hosted(lab, ["one"]) as stage:
            await stage.ask("one", PROMPT)
            await stage.idle()
            steps, step = [0], stage.opened.engine.step

            def counted() -> bool:
                steps[0] += 1
                return step()

            stage.opened.engine.step = counted  # type: ignore[method-assign]
            for _ in range(20):
                await stage.engine.prepare(three["one"])
            assert steps[0] <= 21, "one for each job, and the one that was going on"

    played(scene())


def test_a_cancelled_answer_ends_and_frees_its_seat(lab: Lab, three: dict[str, Version]) -> None:
    async def scene() -> None:
        async with hosted(lab, [*three], slots=1, rows=2) as stage:
            answers = [await stage.begin(name, PROMPT, 400) for name in three for _ in range(2)]
            pieces = answers[0].pieces()
            await anext(pieces)
            for answer in answers:
                answer.cancel()
                answer.cancel()
            ended = [await answer.whole() for answer in answers]
            assert {each.finish for each in ended} == {"cancelled"}
            assert [each.text for each in ended[2:]] == [""] * 4, "they waited for a row"
            await stage.idle()

    played(scene())


def test_an_asker_who_leaves_while_the_request_is_queued_leaves_nothing(lab: Lab, three: dict[str, Version]) -> None:
    async def scene() -> None:
        async with hosted(lab, ["one"]) as stage:
            submit, held = stage.opened.engine.submit, threading.Event()

            def slow(request: Request) -> Ticket:
                held.wait()
                return submit(request)

            stage.opened.engine.submit = slow  # type: ignore[method-assign]
            tasks = [asyncio.create_task(stage.ask("one", PROMPT, new)) for new in (400, 0, 300)]
            await until(lambda: len(stage.engine._beginning) == 3)
            for task in tasks:
                task.cancel()
            gone = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in gone)
            held.set()
            await stage.idle()
            assert stage.opened.engine.passes < 100, "nobody waited for 400 tokens"

    played(scene())


def test_a_full_queue_refuses_and_holds_nothing(lab: Lab, three: dict[str, Version]) -> None:
    async def scene() -> None:
        async with hosted(lab, ["one"], rows=1, waiting=2) as stage:
            found = await asyncio.gather(
                *(stage.begin("one", numbers(9, i), 60) for i in range(12)), return_exceptions=True
            )
            refused = [each for each in found if isinstance(each, EngineBusy)]
            begun = [each for each in found if not isinstance(each, BaseException)]
            assert len(refused) + len(begun) == 12
            assert len(refused) >= 8
            assert len(begun) >= 3, "one row, and two places to wait"
            for answer in begun:
                assert (await answer.whole()).finish in ("stop", "length")
            with pytest.raises(ConfigError, match="temperature is -1"):
                await stage.host.complete("one", PROMPT, Request((), sampling=_Bad))

    played(scene())


_Bad: Any = type("Bad", (), {"temperature": -1, "top_p": 1, "top_k": 0, "seed": 0})()


def test_a_step_that_raises_ends_who_is_answered_and_the_next_one_goes_on(
    lab: Lab, oracle: Oracle, three: dict[str, Version]
) -> None:
    async def scene() -> Completion:
        async with hosted(lab, ["one"], rows=2) as stage:
            answers = [await stage.begin("one", numbers(9, i), 400) for i in range(4)]
            step = stage.opened.engine.step

            def broken() -> bool:
                raise RuntimeError("device-side assert")

            stage.opened.engine.step = broken  # type: ignore[method-assign]
            for answer in answers:
                with pytest.raises(GenerationError, match="RuntimeError: device-side assert"):
                    await answer.whole()
                with pytest.raises(GenerationError):
                    [piece async for piece in answer.pieces()]
            assert "device-side assert" in str(stage.host.trouble())
            stage.opened.engine.step = step  # type: ignore[method-assign]
            answer = await stage.ask("one", PROMPT, 6)
            await until(lambda: stage.host.trouble() is None)
            for failed in answers:
                with pytest.raises(GenerationError, match="device-side assert"):
                    await failed.whole()
            return answer

    assert played(scene()).ids == oracle.ids(three["one"], PROMPT, 6)


def test_a_device_that_is_lost_is_trouble_until_it_answers_again(lab: Lab, three: dict[str, Version]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("device-side assert")

    async def scene() -> None:
        async with hosted(lab, ["one"]) as stage:
            hook = stage.opened.fleet.bank.model.register_forward_pre_hook(broken)
            for i in range(3):
                held, together = threading.Event(), threading.Event()
                waiting = asyncio.create_task(stage.engine._between_steps(partial(_hold, held, together)))
                await asyncio.to_thread(held.wait)
                answers = [await stage.begin("one", numbers(9, j + 9 * i)) for j in range(4)]
                assert stage.host.trouble() is None, "four that fail in one pass are one failure"
                together.set()
                await waiting
                for answer in answers:
                    with pytest.raises(GenerationError, match="device-side assert"):
                        await answer.whole()
                await stage.idle()
            await until(lambda: stage.host.trouble() is not None)
            assert "device-side assert" in str(stage.host.trouble())
            hook.remove()
            await stage.ask("one", PROMPT)
            await until(lambda: stage.host.trouble() is None)

    played(scene())


def test_closing_finishes_what_was_begun_and_cuts_off_what_takes_too_long(lab: Lab, three: dict[str, Version]) -> None:
    async def closed(seconds: float) -> list[str]:
        opened = opened_over(lab)
        engine = LocalEngine(opened)
        assert engine.trouble() == "the engine does not run"
        engine.start()
        assert engine.trouble() is None
        answers = [
            await engine.begin(version, Request(tuple(PROMPT), max_new_tokens=150)) for version in three.values()
        ]
        await engine.close(seconds)
        await engine.close(seconds)
        with pytest.raises(EngineBusy):
            await engine.begin(None, Request(tuple(PROMPT)))
        with pytest.raises(EngineBusy):
            await engine.prepare(three["one"])
        assert opened.fleet.bank.bytes == 0
        assert not opened.versions
        return [(await answer.whole()).finish for answer in answers]

    assert set(played(closed(60))) <= {"stop", "length"}
    assert "cancelled" in played(closed(0))


def test_a_version_that_is_removed_from_disk_answers_as_long_as_it_is_served(
    lab: Lab, oracle: Oracle, three: dict[str, Version]
) -> None:
    version = lab.lora("fleeting", 51)
    known = oracle.ids(version, PROMPT, 6)

    async def scene() -> None:
        async with hosted(lab, ["fleeting"]) as stage:
            version.path.rename(version.path.with_name("gone"))
            assert (await stage.ask("fleeting", PROMPT, 6)).ids == known
            assert (await stage.ask("fleeting", PROMPT, 6)).ids == known
            await stage.host.detach("fleeting")
            assert not stage.opened.versions

    played(scene())


def test_while_all_seats_are_taken_a_version_is_checked_without_one(
    lab: Lab, oracle: Oracle, three: dict[str, Version]
) -> None:
    bad = lab.lora("bad-beside", 52)
    damage(bad.path / "adapter_model.safetensors")

    async def scene() -> Completion:
        async with hosted(lab, ["one"], slots=1) as stage:
            endless = await stage.begin("one", PROMPT, 400, stop_ids=())
            await anext(endless.pieces())
            with pytest.raises(AdapterDamaged):
                await stage.host.attach("bad-beside")
            assert (await stage.host.attach("two")).version == three["two"]
            endless.cancel()
            return await stage.ask("two", PROMPT, 6)

    assert played(scene()).ids == oracle.ids(three["two"], PROMPT, 6)


def test_memory_is_flat_over_requests_cancellations_and_versions(lab: Lab, three: dict[str, Version]) -> None:
    versions = [lab.lora("again", 60 + i) for i in range(2)]

    async def round_of(stage: Any, i: int) -> None:
        answers = [
            await stage.begin(name, numbers(5 + j, j), 12) for j, name in enumerate(["one", "again", "base"] * 3)
        ]
        for answer in answers[::2]:
            answer.cancel()
        await stage.host.move("again", "latest", versions[i % 2].id)
        for answer in answers:
            await answer.whole()
        await stage.ask("one", PROMPT, 2)  # the bank remembers the slots of its last batch
        await stage.idle()

    async def scene() -> list[int]:
        async with hosted(lab, ["one", "again"], slots=2) as stage:
            stage.opened.engine._prefixes = type(stage.opened.engine._prefixes)(0)
            found = []
            for i in range(12):
                await round_of(stage, i)
                if i % 2:
                    found.append(await stage.engine._between_steps(live_bytes))
            return found[1:]

    found = played(scene())
    # The stacks are of one of two sizes, by whether the old version leaves before the next one comes; what is kept for
    # every round would give five sizes.
    assert len(found) == 5
    assert len(set(found)) <= 2, found


def test_a_base_is_opened_without_adapters(lab: Lab, oracle: Oracle) -> None:
    cache = lab.folder / "cache"
    with pytest.raises(BaseError, match="neither an adapter nor a base"):
        find_base([], cache)
    found = find_base([], cache, base=str(lab.base))
    assert found.quant.bits == 16
    opened = open_engine(find_base([], cache, base=str(lab.base), bits=32), [], cache)

    async def scene() -> Completion:
        engine = LocalEngine(opened)
        engine.start()
        answer = await engine.begin(None, Request(tuple(PROMPT), max_new_tokens=6))
        assert engine.rendering(None).template == "base"
        await engine.close(60)
        return await answer.whole()

    assert played(scene()).ids == oracle.ids(None, PROMPT, 6)


@pytest.mark.parametrize("queued", [False, True])
def test_closing_gives_up_who_takes_too_long_to_begin(queued: bool, lab: Lab, three: dict[str, Version]) -> None:
    async def scene() -> None:
        opened = opened_over(lab)
        engine, submit, held = LocalEngine(opened), opened.engine.submit, threading.Event()
        engine.start()
        tickets: list[Ticket] = []

        def slow(request: Request) -> Ticket:
            if queued:
                tickets.append(submit(request))
            held.wait()
            return tickets[0] if queued else submit(request)

        opened.engine.submit = slow  # type: ignore[method-assign]
        asking = asyncio.create_task(engine.begin(None, Request(tuple(PROMPT), max_new_tokens=400)))
        await until(lambda: bool(tickets if queued else engine._beginning))
        await engine.close(0.05)
        assert not engine._thread.is_alive()
        with pytest.raises(EngineBusy, match="has been closed"):
            await asking
        held.set()
        await until(lambda: not engine._beginning)
        assert all(ticket.cancelled for ticket in tickets)
        assert not engine._on_way

    played(scene())


def test_nothing_is_kept_of_versions_that_no_name_stands_for(lab: Lab, oracle: Oracle) -> None:
    """Those that wait for a row still answer, with their files gone."""
    old, known = lab.lora("worn", 80), []
    prompts = [numbers(9, i) for i in range(3)]
    expected = [oracle.ids(old, prompt, 40) for prompt in prompts]

    async def scene() -> None:
        async with hosted(lab, ["worn"], rows=1) as stage:
            answers = [await stage.begin("worn", prompt, 40) for prompt in prompts]
            held, together = threading.Event(), threading.Event()
            new = lab.lora("worn", 81, r=6)
            await stage.host.reload("worn")
            holding = asyncio.create_task(stage.engine._between_steps(partial(_hold, held, together)))
            await asyncio.to_thread(held.wait)
            old.path.rename(old.path.with_name("worn-away"))
            together.set()
            await holding
            known.extend([(await answer.whole()).ids for answer in answers])
            await until(lambda: not traces(stage.opened.fleet, old))
            assert traces(stage.opened.fleet, new)
            old.path.with_name("worn-away").rename(old.path)
            await stage.host.move("worn", "latest", old.id)
            await until(lambda: not traces(stage.opened.fleet, new))
            bad = lab.lora("worn", 82)
            damage(bad.path / "adapter_model.safetensors")
            with pytest.raises(AdapterDamaged):
                await stage.host.reload("worn")
            await until(lambda: not traces(stage.opened.fleet, bad))
            await stage.host.detach("worn")
            await until(lambda: not traces(stage.opened.fleet, old))
            assert not stage.opened.fleet._learned._shapes
            assert stage.opened.fleet.bank.bytes == 0

    played(scene())
    assert known == expected


def traces(fleet: Fleet, version: Version) -> list[str]:
    """Where something is held of a version."""
    held = {
        "residents": fleet._residents, "host memory": fleet._waiting.ids, "reasons": fleet._learned.reasons,
        "needs": fleet._learned.needs, "forgotten": fleet._forgotten,
    }  # fmt: skip
    return [where for where, ids in held.items() if version.id in ids]


def test_a_forgotten_version_goes_with_its_last_seat_unless_it_is_asked_again(
    lab: Lab, three: dict[str, Version]
) -> None:
    opened = opened_over(lab)
    fleet, version = opened.fleet, three["one"]
    opened.versions[version.reference] = version

    def seat() -> Seat:
        found = fleet.seat(fleet.identify(version.reference))
        assert found is not None
        return found

    first, second = seat(), seat()
    fleet.forget(version.id)
    fleet.release(first)
    assert "residents" in traces(fleet, version)
    fleet.release(second)
    assert traces(fleet, version) == []
    first = seat()
    fleet.forget(version.id)
    fleet.release(seat())
    fleet.release(first)
    assert "residents" in traces(fleet, version)
    fleet.pin(version.reference)
    fleet.forget(version.id)
    assert "residents" in traces(fleet, version)
    fleet.unpin(version.reference)
    fleet.forget(version.id)
    assert traces(fleet, version) == []
    fleet.forget("nobody")
    fleet.close()
