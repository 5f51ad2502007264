"""VllmEngine against a small server that speaks vLLM 0.32's routes (fake_vllm.py), as processes over a real socket.

The real vLLM answers in tests/engines/test_vllm_serving.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from generation.adapters_lab import Lab
from serving import fake_vllm

from peftkit.errors import (
    BackboneError,
    BaseMismatch,
    ConfigError,
    DeltaError,
    EngineBusy,
    EngineGone,
    GenerationError,
    TuningError,
)
from peftkit.events import Event, Warned
from peftkit.generation.limits import Limits
from peftkit.generation.opening import find_base
from peftkit.generation.requests import Request, Sampling
from peftkit.registry.store import Version
from peftkit.serving.vllm import client
from peftkit.serving.vllm.engine import VllmEngine
from peftkit.serving.vllm.exported import export_version
from peftkit.serving.vllm.process import find_vllm
from peftkit.serving.vllm.start import start_vllm

T = TypeVar("T")
SECONDS = 30.0
PROMPT = (70, 71, 72)
LIMITS = Limits(rows=4, waiting=4)


class Vllm:
    """A lab's vLLM: its command, what it has heard, and a loop in which an engine over it lives."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.events: list[Event] = []
        self.runner = asyncio.Runner()
        self.command = folder / "vllm"
        script = f"import os, runpy\nos.environ['FAKE_VLLM'] = {str(folder)!r}\n"
        script += f"runpy.run_path({fake_vllm.__file__!r}, None, '__main__')\n"
        self.command.write_text(f"#!{sys.executable}\n{script}")
        self.command.chmod(0o755)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(SECONDS):
                return await coroutine

        return self.runner.run(bounded())

    async def start(self, *names: str, limits: Limits = LIMITS, arguments: tuple[str, ...] = ()) -> VllmEngine:
        versions, cache = [self.lab.registry.resolve(name) for name in names], self.lab.folder / "cache"
        found = find_base(versions, cache, base=str(self.lab.base), bits=32)
        more: dict[str, Any] = {"vllm": str(self.command), "limits": limits, "report": self.events.append}
        return await start_vllm(found, versions, self.lab.registry, cache, arguments=arguments, **more)

    def heard(self, what: str) -> list[dict[str, Any]]:
        file = self.folder / "heard.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if line["what"] == what]

    def wish(self, name: str) -> Path:
        path = self.folder / name
        path.touch()
        return path

    def answer(self, version: Version | None, prompt: tuple[int, ...] = PROMPT) -> list[int]:
        """What is right: by an export of its own."""
        if version is None:
            return fake_vllm.letters(b"", prompt)
        out = self.folder / "oracle" / version.id
        if not out.exists():
            export_version(
                self.lab.registry, version, self.lab.base, out, self.lab.folder / "cache", self.events.append
            )
        return fake_vllm.letters((out / version.name / "adapter_model.safetensors").read_bytes(), prompt)


@pytest.fixture(scope="module")
def vllm(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    made = Vllm(lab, tmp_path_factory.mktemp("vllm"))
    yield made
    made.runner.close()


@pytest.fixture(scope="module")
def engine(vllm: Vllm) -> Iterator[VllmEngine]:
    """One engine for the tests of this file that leave it alive, with `tickets`."""
    started = vllm.run(vllm.start("tickets", arguments=("--tensor-parallel-size", "2")))
    yield started
    vllm.run(started.close(1))


@pytest.fixture
def own(lab: Lab, tmp_path: Path) -> Iterator[Vllm]:
    """A vLLM that a test may end."""
    made = Vllm(lab, tmp_path)
    yield made
    made.runner.close()


def text(ids: list[int]) -> str:
    return "".join(chr(token - 3 + ord("!")) for token in ids)


async def until(met: Callable[[], object]) -> None:
    while not met():
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_vllm_is_started_with_what_the_server_decides_and_what_its_user_adds(vllm: Vllm, engine: VllmEngine) -> None:
    (start,) = vllm.heard("start")
    given = start["arguments"]
    assert given[:4] == ["serve", str(vllm.lab.base), "--served-model-name", "base"]
    pairs = dict(itertools.pairwise(given))
    assert {name: pairs[name] for name in ("--dtype", "--max-lora-rank", "--max-loras", "--max-num-seqs")} == {
        "--dtype": "float32", "--max-lora-rank": "8", "--max-loras": "2", "--max-num-seqs": "4",
    }  # fmt: skip
    assert given[-2:] == ["--tensor-parallel-size", "2"]
    assert start["environment"] == {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    assert Path(pairs["--uds"]).parent.stat().st_mode & 0o077 == 0  # nobody else may ask it
    assert engine.positions == 512
    assert engine.base == vllm.lab.base.name


def test_every_version_answers_for_itself_as_our_own_engine_words_it(vllm: Vllm, engine: VllmEngine) -> None:
    async def ask(version: Version | None) -> None:
        expected = vllm.answer(version)
        held_back = f"{text(expected)[2]}\u2603"  # its first letter may be the beginning of what ends the answer
        answer = await engine.begin(version, Request(PROMPT, max_new_tokens=64, logprobs=2, stop=(held_back,)))
        pieces: list[str] = []
        async for piece in answer.pieces():
            pieces.append(piece)
            assert text([each.token for each in answer.scored]) == "".join(pieces)
        whole = await answer.whole()
        assert (answer.prompt_tokens, answer.reference) == (3, version.reference if version else None)
        assert "".join(pieces) == whole.text == text(expected)
        assert (whole.ids, whole.stopped, whole.finish) == (expected, True, "stop")
        assert whole.adapter == answer.reference
        assert [each.token for each in whole.logprobs] == expected
        assert [each.value for each in whole.logprobs] == [-at / 8 for at in range(1, len(expected) + 1)]
        assert 1 < len(answer.scored) <= len(expected)
        assert tuple(answer.scored) == whole.logprobs[: len(answer.scored)]
        assert whole.logprobs[-1].top == ((200, 0.0), (201, -1 / 16))  # the chosen one is not among the likeliest two

    tickets, sql = (vllm.lab.registry.resolve(name) for name in ("tickets", "sql"))
    vllm.run(engine.prepare(sql))
    assert len({str(vllm.answer(each)) for each in (None, tickets, sql)}) == 3
    for version in (None, tickets, sql):
        vllm.run(ask(version))
    assert set(engine.load().resident) == {tickets.reference, sql.reference}
    vllm.run(engine.forget(sql))


def test_a_request_is_asked_of_vllm_as_it_was_asked(vllm: Vllm, engine: VllmEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, seed=2**64 - 3)
    request = Request(PROMPT, max_new_tokens=3, sampling=sampling, stop_ids=(200,), json_schema=schema)

    async def ask() -> None:
        whole = await (await engine.begin(None, request)).whole()
        assert (whole.finish, whole.stopped, whole.ids) == ("length", False, vllm.answer(None)[:3])

    vllm.run(ask())
    assert vllm.heard("complete")[-1]["body"] == {
        "model": "base", "prompt": list(PROMPT), "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
        "seed": -3, "ignore_eos": True, "stop_token_ids": [2, 200], "return_token_ids": True, "stream": True,
        "structured_outputs": {"json": schema},
    }  # fmt: skip


def test_a_stop_string_cuts_the_text_and_ends_the_work(vllm: Vllm, engine: VllmEngine) -> None:
    prompt = (fake_vllm.ENDLESS, *PROMPT)
    expected = vllm.answer(None, prompt)

    async def ask() -> None:
        before = len(vllm.heard("aborted"))
        answer = await engine.begin(None, Request(prompt, max_new_tokens=10**6, stop=(text(expected)[2:4],)))
        whole = await answer.whole()
        assert (whole.text, whole.ids, whole.finish) == (text(expected[:2]), expected[:4], "stop")
        await until(lambda: len(vllm.heard("aborted")) > before)

    vllm.run(ask())


def test_an_alias_moves_under_load_and_every_answer_is_of_one_version(vllm: Vllm, engine: VllmEngine) -> None:
    old, new = vllm.lab.lora("moving", 11), vllm.lab.lora("moving", 12)
    assert vllm.answer(old) != vllm.answer(new)

    async def move() -> None:
        await engine.prepare(old)
        hold = vllm.wish("hold")
        early = await engine.begin(old, Request(PROMPT, max_new_tokens=64))
        await engine.prepare(new)
        await engine.forget(old)
        late = await engine.begin(new, Request(PROMPT, max_new_tokens=64))
        assert old.reference not in engine.load().resident
        assert not [line for line in vllm.heard("unload") if line["name"] == old.reference]  # it still answers
        hold.unlink()
        assert ((await early.whole()).ids, early.reference) == (vllm.answer(old), old.reference)
        assert ((await late.whole()).ids, late.reference) == (vllm.answer(new), new.reference)
        await until(lambda: [line for line in vllm.heard("unload") if line["name"] == old.reference])
        again = await engine.begin(old, Request(PROMPT, max_new_tokens=64))  # asked for by a name that has moved since
        assert (await again.whole()).ids == vllm.answer(old)
        await until(lambda: [line["name"] for line in vllm.heard("unload")].count(old.reference) == 2)
        await engine.prepare(old)
        await engine.forget(old)
        await engine.prepare(old)  # back before it has left
        assert (await (await engine.begin(old, Request(PROMPT, max_new_tokens=64))).whole()).ids == vllm.answer(old)
        assert old.reference in engine.load().resident

    vllm.run(move())
    loaded = [(line["name"], line["path"]) for line in vllm.heard("load")]
    assert len({path for _, path in loaded}) == len(loaded)  # never twice from one place: vLLM keeps what it has read
    assert all("@" in name for name, _ in loaded)


def test_whoever_leaves_ends_the_work(vllm: Vllm, engine: VllmEngine) -> None:
    async def leave() -> None:
        before, hold = len(vllm.heard("aborted")), vllm.wish("hold")
        answers = [await engine.begin(None, Request(PROMPT, max_new_tokens=64)) for _ in range(3)]
        await until(lambda: engine.load().running == 3)
        for answer in answers:
            answer.cancel()
            answer.cancel()
        for answer in answers:
            whole = await answer.whole()
            assert (whole.finish, whole.text, [piece async for piece in answer.pieces()]) == ("cancelled", "", [])
        await until(lambda: len(vllm.heard("aborted")) == before + 3)
        hold.unlink()
        await until(lambda: engine.load().running == 0)

    vllm.run(leave())


def test_what_vllm_refuses_is_an_error_and_the_rest_is_answered(vllm: Vllm, engine: VllmEngine) -> None:
    sql = vllm.lab.registry.resolve("sql")

    async def ask() -> None:
        await engine.prepare(sql)
        good = await engine.begin(None, Request(PROMPT, max_new_tokens=64))
        with pytest.raises(ConfigError, match="maximum context length is 512"):
            await engine.begin(sql, Request((fake_vllm.REFUSED,), max_new_tokens=4))
        before = len(vllm.heard("unload"))
        await engine.forget(sql)
        await until(lambda: len(vllm.heard("unload")) > before)  # nobody uses it
        failing = await engine.begin(None, Request((fake_vllm.FAILING, 9), max_new_tokens=4))
        first = vllm.answer(None, (fake_vllm.FAILING, 9))[:1]
        with pytest.raises(GenerationError, match="500: Internal server error"):
            await failing.whole()
        given = []
        with pytest.raises(GenerationError, match="500: Internal server error"):
            async for piece in failing.pieces():
                given.append(piece)
        assert given == [text(first)]
        assert (await good.whole()).ids == vllm.answer(None)

    vllm.run(ask())
    asked = len(vllm.heard("complete"))
    for wrong in (
        Request(()),
        Request(PROMPT, max_new_tokens=0),
        Request(PROMPT, logprobs=21),
        Request((9999,)),
        Request(PROMPT * 171),
        Request(PROMPT, json_schema={"type": "nothing"}),
    ):
        with pytest.raises(ConfigError):
            vllm.run(engine.begin(None, wrong))
    assert len(vllm.heard("complete")) == asked


def test_a_version_that_cannot_be_taken_changes_nothing(vllm: Vllm, engine: VllmEngine) -> None:
    before = engine.load().resident
    with pytest.raises(TuningError, match="rank 12, and vLLM was started for 8") as refused:
        vllm.run(engine.prepare(vllm.lab.lora("wide", 3, r=12)))
    assert "--max-lora-rank 16" in str(refused.value)
    with pytest.raises(DeltaError, match="DoRA"):
        vllm.run(engine.prepare(dora(vllm.lab)))
    full = vllm.wish("full")
    with pytest.raises(TuningError, match=r"does not take late@.*no memory"):
        vllm.run(engine.prepare(vllm.lab.lora("late", 4)))
    full.unlink()
    assert engine.load().resident == before
    vllm.run(engine.prepare(vllm.lab.registry.resolve("late")))


def test_whoever_leaves_while_a_version_is_loaded_leaves_nothing_behind(vllm: Vllm, engine: VllmEngine) -> None:
    version = vllm.lab.lora("left", 8)

    async def leave() -> None:
        slow = vllm.wish("slow")
        preparing = asyncio.create_task(engine.prepare(version))
        await until(lambda: version.reference in [line["name"] for line in vllm.heard("load")])
        preparing.cancel()
        await until(lambda: version.reference in [line["name"] for line in vllm.heard("unload")])
        slow.unlink()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        assert version.reference not in engine.load().resident
        await engine.prepare(version)
        answer = await engine.begin(version, Request(PROMPT, max_new_tokens=64))
        assert (await answer.whole()).ids == vllm.answer(version)

    vllm.run(leave())


def test_a_version_that_vllm_does_not_load_in_time_is_refused(own: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    version = own.lab.lora("slow", 9)

    async def wait() -> None:
        engine = await own.start()
        monkeypatch.setattr(client, "_LOAD_SECONDS", 0.1)
        slow = own.wish("slow")
        with pytest.raises(EngineGone, match=r"(?s)has not answered /v1/load_lora_adapter within 0\.1 seconds"):
            await engine.prepare(version)
        slow.unlink()
        await engine.close(5)
        with pytest.raises(EngineGone, match="has been ended"):
            await engine._client.load("late", Path("late"))

    own.run(wait())


def dora(lab: Lab) -> Version:
    import torch
    from safetensors.torch import load, save

    folder = lab.payload("dora", 6, use_dora=True)
    tensors = load((folder / "adapter_model.safetensors").read_bytes())
    for name in [each for each in tensors if "lora_B" in each]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(tensors[name].shape[0])
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    return lab.publish("dora", folder)


def test_the_queue_is_bounded_and_closed_before_the_end(own: Vllm) -> None:
    async def fill() -> None:
        engine = await own.start("tickets", limits=Limits(rows=1, waiting=1))
        own.wish("hold")
        tickets = own.lab.registry.resolve("tickets")
        answers = [await engine.begin(tickets, Request(PROMPT, max_new_tokens=64)) for _ in range(2)]
        with pytest.raises(EngineBusy, match="1 requests are answered and 1 wait"):
            await engine.begin(None, Request(PROMPT))
        closing = asyncio.create_task(engine.close(0.2))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="no more requests"):
            await engine.begin(None, Request(PROMPT))
        await closing
        assert [(await answer.whole()).finish for answer in answers] == ["cancelled"] * 2
        assert gone(own.heard("start")[0]["pid"])
        assert not engine.process.folder.exists()

    own.run(fill())


def test_answers_on_their_way_are_finished_before_vllm_ends(own: Vllm) -> None:
    async def drain() -> None:
        engine = await own.start("tickets")
        hold, tickets = own.wish("hold"), own.lab.registry.resolve("tickets")
        answer = await engine.begin(tickets, Request(PROMPT, max_new_tokens=64))
        closing = asyncio.create_task(engine.close(SECONDS))
        await asyncio.sleep(0)
        hold.unlink()
        await closing
        assert (await answer.whole()).ids == own.answer(tickets)

    own.run(drain())


def test_the_death_of_vllm_is_told(own: Vllm) -> None:
    async def die() -> None:
        engine = await own.start()
        own.wish("hold")
        answer = await engine.begin(None, Request(PROMPT, max_new_tokens=64))
        assert engine.trouble() is None
        own.wish("die")
        with pytest.raises(EngineGone, match="vLLM cannot be reached"):
            await answer.whole()
        await until(lambda: engine.trouble() == "vLLM has ended with status 3")
        with pytest.raises(EngineGone, match="vLLM has ended with status 3"):
            await engine.begin(None, Request(PROMPT))
        with pytest.raises(EngineGone, match="vLLM cannot be reached"):
            await engine.prepare(own.lab.lora("late", 9))
        await until(lambda: any(isinstance(each, Warned) and "no memory left" in each.text for each in own.events))
        await engine.close(5)
        assert not engine.process.folder.exists()

    own.run(die())


def test_a_vllm_that_does_not_come_up_is_an_error_with_its_last_words(own: Vllm, tmp_path: Path) -> None:
    own.wish("die")
    with pytest.raises(BackboneError, match=r"(?s)ended with status 3 before it could answer.*no memory left"):
        own.run(own.start("tickets"))
    (start,) = own.heard("start")
    folder = Path(start["arguments"][start["arguments"].index("--uds") + 1]).parent
    assert gone(start["pid"])
    assert not folder.exists()


def test_vllm_does_not_outlive_a_server_that_is_killed(own: Vllm, tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    arguments = ["serve", "BASE", "--uds", str(folder / "http"), "--max-lora-rank", "8"]
    script = f"""
        import asyncio, os
        from pathlib import Path
        from peftkit.serving.vllm.process import Process

        async def main():
            wanted = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")
            environment = {{**os.environ, **dict.fromkeys(wanted, "1")}}
            await Process.start({[str(own.command), *arguments]!r}, Path({str(folder)!r}), environment)
            while not Path({str(folder / "http")!r}).exists():
                await asyncio.sleep(0.01)
            print("up", flush=True)
            await asyncio.sleep({10 * SECONDS})

        asyncio.run(main())
    """
    server = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    (start,) = own.heard("start")
    assert not gone(start["pid"])
    server.send_signal(signal.SIGKILL)
    server.wait()
    deadline = time.monotonic() + SECONDS
    while not gone(start["pid"]) or folder.exists():
        assert time.monotonic() < deadline, "vLLM is still there"
        time.sleep(0.01)


def test_what_is_the_servers_to_say_is_refused_before_anything_starts(own: Vllm) -> None:
    for arguments, named in (
        (("--port", "8001"), "--port"),
        (("--served_model_name=x",), "--served-model-name"),
        (("--max-lora-rank", "large"), "--max-lora-rank large"),
    ):
        with pytest.raises(ConfigError, match=named):
            own.run(own.start("tickets", arguments=arguments))
    assert own.heard("start") == []
    other = own.lab.folder / "other"
    if not other.exists():
        from tiny_bases import write_base

        write_base(other, seed=77)
    versions, cache = [own.lab.registry.resolve("tickets")], own.lab.folder / "cache"
    found = find_base(versions, cache, base=str(other), bits=32)
    with pytest.raises(BaseMismatch):
        own.run(start_vllm(found, versions, own.lab.registry, cache, vllm=str(own.command)))
    assert own.heard("start") == []


def test_vllm_is_found_by_name_variable_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTKIT_VLLM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="vLLM is not on PATH") as missing:
        find_vllm()
    assert "pip install vllm" in str(missing.value)
    for name in ("vllm", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert find_vllm() == [str(tmp_path / "vllm")]
    monkeypatch.setenv("PEFTKIT_VLLM", str(tmp_path / "python3"))
    assert find_vllm() == [str(tmp_path / "python3"), "-m", "vllm.entrypoints.cli.main"]
    with pytest.raises(ConfigError, match="/nowhere/vllm is no command"):
        find_vllm("/nowhere/vllm")
