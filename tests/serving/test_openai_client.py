"""OpenAI's own client against a real server: answers are what each version says alone, and errors are its classes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from generation.adapters_lab import Lab, make_lab
from generation.serving_lab import Oracle
from hypothesis import HealthCheck, given, settings
from serving.bodies import CHAT, MESSAGES, TEXT, changed
from serving.server_lab import Server, ask, check_free, serving, until
from serving.test_told import only_known
from serving.tool_templates import HERMES

from peftkit.data.template import Rendering
from peftkit.generation.answer import prompt_of
from peftkit.registry.store import Version

pytestmark = pytest.mark.loopback

MODELS = ("base", "tickets", "sql")
HI = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
LONG = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 8000}}}
NEW = 12


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
    check_free(server)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A base with room for answers that are long on the way, and with tools in its template."""
    return make_lab(tmp_path_factory.mktemp("roomy"), max_position_embeddings=16384, template=HERMES)


@pytest.fixture(scope="module")
def busy(roomy: Lab) -> Iterator[Server]:
    """A server with one row, room for two more to wait, and a key."""
    with serving(roomy, rows=1, waiting=2, max_new_tokens=10_000, api_key="secret") as running:
        yield running


def client_of(server: Server, **settings: Any) -> openai.OpenAI:
    given = {"api_key": "secret", "max_retries": 0, "timeout": 60, **settings}
    return openai.OpenAI(base_url=f"{server.address}/v1", **given)


def version_of(server: Server, model: str) -> Version | None:
    return None if model == "base" else server.host.registry.resolve(model)


def text_of(server: Server, oracle: Oracle, model: str, prompt: tuple[int, ...], new: int = NEW) -> str:
    """What a version answers alone."""
    return server.opened.backbone.tokenizer.decode(oracle.ids(version_of(server, model), prompt, new))


def chat_ids(server: Server, turns: Any = HI) -> tuple[int, ...]:
    return prompt_of(turns, server.opened.backbone.tokenizer, Rendering())


def greedy(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": NEW, **more}


def test_models_are_listed_and_found(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "tickets", "sql"]
    found = client.models.retrieve("tickets")
    only_known(found)
    assert (found.id, found.object) == ("tickets", "model")
    exact = server.host.registry.resolve("tickets").reference
    assert client.models.retrieve(exact).id == exact
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("model", MODELS)
def test_a_conversation_is_answered_by_the_version_that_was_asked(
    server: Server, oracle: Oracle, client: openai.OpenAI, model: str
) -> None:
    expected = text_of(server, oracle, model, chat_ids(server))
    whole = client.chat.completions.create(model=model, messages=HI, **greedy())
    only_known(whole)
    version = version_of(server, model)
    assert whole.model == (version.reference if version else "base")
    assert whole.system_fingerprint == f"fp_{server.host.fingerprint[:12]}"
    assert whole.choices[0].message.content == expected
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(chat_ids(server)), NEW)
    assert whole.choices[0].finish_reason == "length"
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=model, messages=HI, **greedy(), stream=True, stream_options=options)
    )
    for chunk in chunks:
        only_known(chunk)
    assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, whole.model)}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


@pytest.mark.parametrize("stream", [False, True])
def test_texts_of_all_kinds_are_gone_on_with(
    server: Server, oracle: Oracle, client: openai.OpenAI, stream: bool
) -> None:
    tokenizer = server.opened.backbone.tokenizer
    ids = [(*tokenizer.bos, *tokenizer.encode(text)) for text in ("one", "two")]
    expected = [text_of(server, oracle, "sql", each) for each in ids]
    for prompt in (["one", "two"], [list(each) for each in ids]):
        given = client.completions.create(model="sql", prompt=prompt, **greedy(), stream=stream)  # type: ignore[call-overload]
        if stream:
            found = {0: "", 1: ""}
            for chunk in given:
                found[chunk.choices[0].index] += chunk.choices[0].text
            assert list(found.values()) == expected
        else:
            only_known(given)
            assert [choice.text for choice in given.choices] == expected
            assert given.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model="sql", prompt=list(ids[0]), **greedy())
    assert one.choices[0].text == expected[0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_repeats_its_prompt_when_asked(server: Server, client: openai.OpenAI, stream: bool) -> None:
    plain = client.completions.create(model="base", prompt="one", **greedy()).choices[0].text
    given = client.completions.create(model="base", prompt="one", **greedy(), echo=True, stream=stream)  # type: ignore[call-overload]
    found = "".join(chunk.choices[0].text for chunk in given) if stream else given.choices[0].text
    assert found == f"one{plain}"


def test_several_answers_have_seeds_of_their_own_that_can_be_asked_for_again(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str | None]:
        found = client.chat.completions.create(model="tickets", messages=HI, temperature=2, max_tokens=NEW, **more)
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        return [choice.message.content for choice in found.choices]

    three = ask(n=3, seed=7)
    assert len(set(three)) == 3
    assert ask(n=3, seed=7) == three
    assert ask(seed=7) + ask(seed=8) + ask(seed=9) == three
    assert ask() != ask()
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(
        model="tickets", messages=HI, temperature=2, max_tokens=NEW, n=3, seed=7, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == three


def test_a_stop_string_ends_an_answer_and_is_not_in_it(server: Server, oracle: Oracle, client: openai.OpenAI) -> None:
    text = text_of(server, oracle, "tickets", chat_ids(server))
    stop = text[5]
    found = client.chat.completions.create(model="tickets", messages=HI, **greedy(stop=[stop]))
    assert found.choices[0].message.content == text.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_versions_own(server: Server, oracle: Oracle, client: openai.OpenAI, stream: bool) -> None:
    version, prompt = version_of(server, "sql"), chat_ids(server)
    ids = oracle.ids(version, prompt, NEW)
    known = oracle.logprobs(version, prompt, ids)
    given = client.chat.completions.create(
        model="sql", messages=HI, **greedy(logprobs=True, top_logprobs=3), stream=stream
    )  # type: ignore[call-overload]
    choices = [chunk.choices[0] for chunk in given] if stream else given.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    tokenizer = server.opened.backbone.tokenizer
    assert [each.token for each in tokens] == [tokenizer.decode([token]) for token in ids]
    for each, token, row in zip(tokens, ids, known, strict=False):
        assert math.isclose(each.logprob, float(row[token]), abs_tol=1e-4)
        assert len(each.top_logprobs) == 3
        assert math.isclose(each.top_logprobs[0].logprob, float(row.max()), abs_tol=1e-4)
    whole = b"".join(bytes(each.bytes) for each in tokens)
    assert whole.decode(errors="replace") == tokenizer.decode(list(ids))


def test_logprobs_of_a_stream_stand_beside_the_text_of_their_tokens(server: Server, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="sql", messages=HI, **greedy(logprobs=True), stream=True)  # type: ignore[call-overload]
    told = [choice for choice in (chunk.choices[0] for chunk in chat) if choice.logprobs]
    assert told
    for choice in told[:-1]:  # the last one may have what no text was certain for
        spelled = b"".join(bytes(each.bytes) for each in choice.logprobs.content)
        assert spelled.decode(errors="replace") == choice.delta.content


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 1},
        {"max_tokens": 5},
        {"stop": "{5}{6}"},
        {"stop": "{6}\u2603"},
        {"stop": ["{7}", "{6}{8}"]},
        {"n": 3, "temperature": 2, "seed": 7},
    ],
    ids=str,
)
def test_a_stream_has_the_logprobs_of_the_whole_answer(
    server: Server, oracle: Oracle, client: openai.OpenAI, more: dict[str, Any]
) -> None:
    text = text_of(server, oracle, "sql", chat_ids(server))
    if stop := more.get("stop"):
        stops = [each.format(*text) for each in ([stop] if isinstance(stop, str) else stop)]
        more = {**more, "stop": stops}
    asked = {"model": "sql", "prompt": list(chat_ids(server)), **greedy(logprobs=2), **more}
    streamed: dict[int, list[Any]] = {}
    for chunk in client.completions.create(**asked, stream=True):  # type: ignore[call-overload]
        streamed.setdefault(chunk.choices[0].index, []).append(chunk.choices[0].logprobs)
    for whole in client.completions.create(**asked).choices:  # type: ignore[call-overload]
        told = {
            name: [each for given in streamed[whole.index] if given for each in getattr(given, name)]
            for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
        }
        assert told["tokens"] == whole.logprobs.tokens
        assert told["text_offset"] == whole.logprobs.text_offset
        assert told["token_logprobs"] == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)  # beside other rows
        assert [len(each) for each in told["top_logprobs"]] == [2] * len(told["tokens"])
        shown = zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True)
        assert all(whole.text[at : at + 1] in (token, "") for token, at in shown if not token.startswith("bytes:"))


def test_answers_follow_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model="tickets", messages=HI, response_format=form, max_tokens=120, seed=1)  # type: ignore[call-overload]
    assert json.loads(found.choices[0].message.content)["city"] in ("Paris", "Rome")
    assert found.choices[0].finish_reason == "stop"


def test_a_base_whose_template_shows_no_tools_says_so(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError, match="template"):
            client.chat.completions.create(model="base", messages=HI, tools=[tool], tool_choice=choice, max_tokens=4)  # type: ignore[call-overload]
    called = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    with pytest.raises(openai.BadRequestError, match="template"):
        client.chat.completions.create(model="base", messages=[*HI, called], max_tokens=4)  # type: ignore[list-item]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called(busy: Server, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
                  "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("where", "when")]
    only = {"type": "function", "function": {"name": "when"}}
    with client_of(busy) as client:
        given = client.chat.completions.create(
            model="base", messages=HI, tools=tools, tool_choice=only, max_tokens=200, seed=1, stream=stream
        )  # type: ignore[call-overload]
        if stream:
            chunks = list(given)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            finish = chunks[-1].choices[0].finish_reason
        else:
            only_known(given)
            calls, finish = given.choices[0].message.tool_calls, given.choices[0].finish_reason
            assert given.choices[0].message.content is None
    assert [call.function.name for call in calls] == ["when"]
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")
    assert calls[0].id.startswith("call_")
    assert finish == "tool_calls"


def test_the_asynchronous_client_gets_the_same(server: Server, oracle: Oracle) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:

            async def one(model: str) -> str:
                found = ""
                async for chunk in await client.chat.completions.create(
                    model=model, messages=HI, **greedy(), stream=True
                ):
                    found += chunk.choices[0].delta.content or ""
                return found

            return await asyncio.gather(*map(one, MODELS * 4))

    assert asyncio.run(ask()) == [text_of(server, oracle, model, chat_ids(server)) for model in MODELS] * 4


def test_headers_of_streams_and_answers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="base", messages=HI, **greedy())
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.role == "assistant"
    with client.chat.completions.with_streaming_response.create(
        model="base", messages=HI, **greedy(), stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["cache-control"] == "no-cache"
        assert streamed.headers["x-accel-buffering"] == "no"
        assert list(streamed.iter_lines())[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "temperature", None),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", None),
        ({"max_tokens": 511}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, openai.BadRequestError, "messages", None),
        ({"model": "tickets@"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "tickets@@x"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "tickets@../x"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "tickets@nobody"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "x" * 1_000_000}, openai.BadRequestError, "model", None),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, openai.BadRequestError, None, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}},
         openai.BadRequestError, "response_format", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_classes(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str | None,
    code: str | None, stream: bool,
) -> None:  # fmt: skip
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "base", "messages": HI, "max_tokens": 4, "stream": stream, **fields})
    assert type(caught.value) is kind
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert len(caught.value.response.content) < 1000
    assert "1 problem" not in caught.value.message


def test_what_the_engine_refuses_is_told_of_its_parameter(client: openai.OpenAI) -> None:
    prompts: list[Any] = [[5, 999], [5] * 600, "<|im_end|>" * 600]
    for prompt in prompts:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="base", prompt=prompt, max_tokens=2)
        assert caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tickets@")


def test_an_answer_without_a_length_is_cut_where_the_positions_end(server: Server, client: openai.OpenAI) -> None:
    prompt = [5] * 500
    found = client.completions.create(model="base", prompt=prompt, temperature=0)
    assert found.usage is not None
    assert found.usage.total_tokens <= 512


def test_a_wrong_key_is_an_authentication_error(busy: Server) -> None:
    with client_of(busy, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_one_too_many_is_told_when_to_come_back_and_leaves_nothing_behind(busy: Server) -> None:
    engine, asked = busy.opened.engine, {"model": "base", "messages": HI, "response_format": LONG, "max_tokens": 9000}
    with client_of(busy) as client:
        first = client.chat.completions.create(**asked, stream=True)
        until(lambda: engine.running == 1 and engine.waiting == 0, "a request is answered")
        second = client.chat.completions.create(**asked, stream=True)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**asked, n=2)  # one of the two finds room
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        first.close()
        second.close()
    check_free(busy)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_cut_off_and_its_row_is_free(roomy: Lab, n: int, stream: bool) -> None:
    asked = {"model": "base", "messages": HI, "response_format": LONG, "max_tokens": 9000, "n": n, "stream": stream}
    with (
        serving(roomy, request_seconds=0.3, max_new_tokens=10_000) as server,
        client_of(server, max_retries=2) as client,
    ):
        with pytest.raises(openai.APIError, match="not whole after") as caught:
            list(client.chat.completions.create(**asked))
        assert caught.value.code == "timeout"
        check_free_of_rows(server)
        metrics = ask(server, "GET", "/metrics").body.decode()
        assert 'peftkit_requests_total{end="cancelled",model="base"} 1.0' in metrics  # once: it was not tried again


def check_free_of_rows(server: Server) -> None:
    until(lambda: server.opened.engine.running == server.opened.engine.waiting == 0, "every row is free")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(roomy: Lab, stream: bool) -> None:
    async def leave(server: Server) -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0) as client:
            asked = {"model": "base", "messages": HI, "response_format": LONG, "max_tokens": 9000, "n": 3}

            async def answer() -> None:
                given = await client.chat.completions.create(**asked, stream=stream)
                async for _ in given:
                    pass

            task = asyncio.create_task(answer())
            while server.opened.engine.running < 3:
                await asyncio.sleep(0.01)
                assert not task.done()
            task.cancel()
            await asyncio.wait([task])

    with serving(roomy, max_new_tokens=10_000) as server:
        asyncio.run(asyncio.wait_for(leave(server), 60))
        check_free(server)
        metrics = ask(server, "GET", "/metrics").body.decode()
        assert 'peftkit_requests_total{end="cancelled",model="base"} 1.0' in metrics


@pytest.fixture(scope="module")
def little(lab: Lab) -> Iterator[Server]:
    with serving(lab, ("tickets", "sql"), max_new_tokens=8, default_new_tokens=4) as running:
        yield running


@given(chat=changed(CHAT), text=changed(TEXT))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_body_is_answered_or_refused(little: Server, chat: dict[str, Any], text: dict[str, Any]) -> None:
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        reply = ask(little, "POST", path, body)
        if reply.status != 200:
            assert reply.status in (400, 404, 429)
            assert reply.error["type"] in ("invalid_request_error", "rate_limit_error")
        elif reply.headers["content-type"].startswith("text/event-stream"):
            assert reply.body.endswith(b"data: [DONE]\n\n")
        else:
            assert reply.json["choices"]


def test_no_examples_left_anything_behind(little: Server) -> None:
    assert ask(little, "POST", "/v1/chat/completions", {**CHAT, "messages": MESSAGES}).status == 200
    check_free(little)
