"""What an engine may do to an answer on its way, as OpenAI's client sees it: calls, faults, names that change hands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from generation.adapters_lab import Lab
from serving.scripted import Scripted
from serving.tool_templates import DEEPSEEK, FUNCTION_TAG, HERMES, MISTRAL, QWEN3_CODER, tokenizer_with

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.template import Rendering
from peftkit.errors import GenerationError
from peftkit.generation.constrain import _compiler as compiler_of
from peftkit.registry.store import Registry
from peftkit.serving.host import Host
from peftkit.serving.http.app import create_app
from peftkit.serving.spec import ServeSpec

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("f", "g")
]
CALLS = (
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("hermes"), HERMES)


@asynccontextmanager
async def asking(engine: Scripted, folder: Path, **spec: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of an application over a scripted engine, without a socket between them."""
    settings = ServeSpec.model_validate({"follow_seconds": 0, **spec})
    async with asking_of(Host(engine, Registry(folder), settings), folder) as client:
        yield client


@asynccontextmanager
async def asking_of(host: Host, folder: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    """The same of a host that has started."""
    app = create_app(host, host.spec, runs=folder)
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False, client=("127.0.0.1", 5))
    async with httpx2.AsyncClient(transport=transport) as http:
        yield openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="x", max_retries=0, http_client=http)


async def told(client: openai.AsyncOpenAI, stream: bool, **fields: Any) -> tuple[str, list[Any], str]:
    """Content, calls and reason for the end of the first answer."""
    asked = {"model": "base", "messages": HI, "stream": stream, **fields}
    given: Any = await client.chat.completions.create(**asked)
    if not stream:
        choice = given.choices[0]
        return choice.message.content or "", choice.message.tool_calls or [], choice.finish_reason
    content, calls, finish = "", list[Any](), ""
    async for chunk in given:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        finish = choice.finish_reason or finish
    return content, calls, finish


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "content", "names", "finish"),
    [
        (CALLS, "", ["f", "g"], "tool_calls"),
        (f"I look.\n{CALLS}", "I look.", ["f", "g"], "tool_calls"),
        ("No <tool", "No <tool", [], "stop"),
        ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', [], "stop"),
    ],
)
def test_calls_in_answers(
    tokenizer: Tokenizer, tmp_path: Path, stream: bool, said: str, content: str, names: list[str], finish: str
) -> None:
    async def scene() -> None:
        async with asking(Scripted(tokenizer, [said]), tmp_path) as client:
            found, calls, end = await told(client, stream, tools=TOOLS)
            assert (found, [call.function.name for call in calls], end) == (content, names, finish)
            if calls:
                assert json.loads(calls[0].function.arguments) == {"a": 1}
                assert all(call.id.startswith("call_") for call in calls)
            again, calls, _ = await told(client, stream, tools=TOOLS, parallel_tool_calls=False)
            assert (again, len(calls)) == (content, min(1, len(names)))
            untouched, calls, _ = await told(client, stream, tools=TOOLS, tool_choice="none")
            assert (untouched, calls) == (said, [])

    asyncio.run(scene())


def test_a_conversation_with_calls_goes_on_as_its_template_wants_it(tmp_path: Path) -> None:
    """Mistral's templates take ids of nine characters only, so such ids are given."""
    tokenizer = tokenizer_with(tmp_path / "mistral", MISTRAL, ["[TOOL_CALLS]"])
    engine = Scripted(tokenizer, ['[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]'])

    async def scene() -> str:
        async with asking(engine, tmp_path) as client:
            given = await client.chat.completions.create(model="base", messages=HI, tools=TOOLS)
            message = given.choices[0].message
            assert message.content is None
            call = (message.tool_calls or [])[0]
            result: Any = {"role": "tool", "tool_call_id": call.id, "content": "42"}
            await client.chat.completions.create(
                model="base", messages=[*HI, message.model_dump(), result], tools=TOOLS
            )
            return call.id

    identity = asyncio.run(scene())
    prompt = tokenizer.decode(list(engine.asked[-1].prompt), skip_special_tokens=False)
    assert f'[TOOL_CALLS] [{{"name": "f", "arguments": {{"a": 1}}, "id": "{identity}"}}]' in prompt
    assert "[TOOL_RESULTS] 42" in prompt
    assert len(identity) == 9


def test_a_template_that_reads_arguments_as_text_gets_them_so(tmp_path: Path) -> None:
    template = DEEPSEEK.replace("(c.function.arguments | tojson)", "c.function.arguments")
    tokenizer = tokenizer_with(tmp_path / "deepseek", template)
    engine = Scripted(tokenizer, ["yes"])
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    said: Any = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "42"}]

    async def scene() -> None:
        async with asking(engine, tmp_path) as client:
            await client.chat.completions.create(model="base", messages=[*HI, *said])

    asyncio.run(scene())
    assert 'f\n```json\n{"a": 1}\n```' in tokenizer.decode(list(engine.asked[-1].prompt))


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_between_tags_go_out_as_json_and_back_as_they_were(tmp_path: Path, stream: bool) -> None:
    tokenizer = tokenizer_with(tmp_path / "coder", QWEN3_CODER)
    written = "".join(f"<parameter={name}>\n7\n</parameter>\n" for name in "ab")
    said = f"\n<tool_call>\n<function=h>\n{written}</function>\n</tool_call>"
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    tools: Any = [{"type": "function", "function": {"name": "h", "parameters": parameters}}]
    engine = Scripted(tokenizer, [said])

    async def scene() -> None:
        async with asking(engine, tmp_path) as client:
            content, [call], finish = await told(client, stream, tools=tools)
            assert (content, finish, json.loads(call.function.arguments)) == ("", "tool_calls", {"a": 7, "b": "7"})
            function = {"name": call.function.name, "arguments": call.function.arguments}
            turn: Any = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}
            await told(client, stream, messages=[*HI, turn, *HI], tools=tools)

    asyncio.run(scene())
    assert said in tokenizer.decode(list(engine.asked[-1].prompt))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("fault", [GenerationError("no more memory", hint=""), RuntimeError("a secret", "later")])
def test_a_fault_in_the_middle_is_an_error_event_and_stops_the_others(
    tokenizer: Tokenizer, tmp_path: Path, n: int, fault: Exception
) -> None:
    engine = Scripted(tokenizer, ["fine " * 50, "fine " * 50, fault] if n > 1 else [fault])
    if isinstance(fault, GenerationError):
        fault.args = (*fault.args, "later")

    async def scene() -> None:
        async with asking(engine, tmp_path) as client:
            with pytest.raises(openai.APIError) as caught:
                await told(client, True, n=n)
            assert ("internal error" in str(caught.value)) == isinstance(fault, RuntimeError)
            assert "secret" not in str(caught.value)
            assert all(said.cancelled for said in engine.begun)
            with pytest.raises(openai.InternalServerError) as whole:
                await told(client, False, n=n)
            assert whole.value.status_code == 500
            assert "secret" not in str(whole.value)

    asyncio.run(scene())


def test_when_one_of_several_cannot_begin_the_others_are_stopped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Scripted(tokenizer, ["a", "b", GenerationError("no")])

    async def scene() -> None:
        async with asking(engine, tmp_path) as client:
            for call in (
                client.chat.completions.create(model="base", messages=HI, n=3),
                client.completions.create(model="base", prompt=["x", "y", "z"]),
            ):
                with pytest.raises(openai.InternalServerError, match="no"):
                    await call
                assert all(said.cancelled for said in engine.begun)

    asyncio.run(scene())
    assert len(engine.begun) == 4


@pytest.mark.parametrize("chat", [True, False])
def test_all_answers_to_a_request_are_of_one_version_though_its_name_changes_hands(
    tokenizer: Tokenizer, tmp_path: Path, lab: Lab, chat: bool
) -> None:
    versions = [lab.lora("flag", seed) for seed in (1, 2)]
    lab.registry.tag(versions[0].reference, "prod")
    engine = Scripted(tokenizer, ["a"])
    host = Host(engine, lab.registry, ServeSpec(follow_seconds=0, waiting=64))

    async def flip() -> None:
        await host.move("flag", "prod", versions[len(engine.begun) % 2].id)

    async def scene() -> None:
        await host.start(["flag@prod"])
        engine.meanwhile = flip
        async with asking_of(host, tmp_path) as client:
            found: Any = (
                await client.chat.completions.create(model="flag@prod", messages=HI, n=64)
                if chat
                else await client.completions.create(model="flag@prod", prompt="x", n=64)
            )
            assert (found.model, len(found.choices)) == (versions[0].reference, 64)

    asyncio.run(scene())
    assert [said.reference for said in engine.begun] == [versions[0].reference] * 64
    assert engine.rendered == [versions[0].reference] * chat
    assert host.swaps == 64


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_and_handed_over_as_the_version_that_answers_writes_them(
    tmp_path: Path, lab: Lab, stream: bool
) -> None:
    lab.lora("tagged", 1)
    tokenizer = tokenizer_with(tmp_path / "both", f"{{% if tagged %}}{FUNCTION_TAG}{{% else %}}{HERMES}{{% endif %}}")
    said = '<function=f>{"a": 1}</function>'
    engine = Scripted(tokenizer, [said], renderings={"tagged": Rendering(kwargs={"tagged": True})})
    host = Host(engine, lab.registry, ServeSpec(follow_seconds=0))

    async def scene() -> None:
        await host.start(["tagged"])
        async with asking_of(host, tmp_path) as client:
            found = await told(client, stream, model="tagged", tools=TOOLS)
            assert ([call.function.name for call in found[1]], found[2]) == (["f"], "tool_calls")
            assert await told(client, stream, tools=TOOLS) == (said, [], "stop")

    asyncio.run(scene())


def test_schemas_that_wait_to_be_compiled_hold_up_nobody_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def scene() -> None:
        async with asking(Scripted(tokenizer, ["a"]), tmp_path) as client, asyncio.timeout(30):
            forms: list[Any] = [
                {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": at}}} for at in range(40)
            ]
            with compiler_of(tokenizer).busy:
                tasks = [asyncio.create_task(told(client, False, response_format=form)) for form in forms]
                await asyncio.wait(tasks, timeout=0.5)
                assert await told(client, False) == ("a", [], "stop")
                assert not any(task.done() for task in tasks)
            assert await asyncio.gather(*tasks) == [("a", [], "stop")] * 40

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_an_answer_that_was_cut_off_are_counted(tokenizer: Tokenizer, tmp_path: Path, stream: bool) -> None:
    said = "as far as it came"
    engine = Scripted(tokenizer, [said], endless=True, finish="cancelled")
    total = f'peftkit_completion_tokens_total{{model="scripted"}} {float(2 * len(tokenizer.encode(said)))}'

    async def scene() -> None:
        async with asking(engine, tmp_path, request_seconds=0.05) as client, asyncio.timeout(30):
            with pytest.raises(openai.APIError, match="not whole after"):
                await told(client, stream, n=2)
            while total not in (metrics := (await client._client.get("http://127.0.0.1:8000/metrics")).text):
                await asyncio.sleep(0.01)
            assert 'peftkit_requests_total{end="cancelled",model="scripted"} 1.0' in metrics

    asyncio.run(scene())


def test_an_answer_that_the_end_of_the_server_cut_off_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Scripted(tokenizer, ["so far"], finish="cancelled")

    async def scene() -> None:
        async with asking(engine, tmp_path) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await told(client, False)
            assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
            with pytest.raises(openai.APIError, match="shut down"):
                await told(client, True)

    asyncio.run(scene())
