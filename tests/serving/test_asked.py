"""What a body asks for: everything in it is heeded, or refused by its name; all problems at once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from serving.bodies import CALLED, CHAT, MESSAGES, TEXT, TOOL, changed

from peftkit.generation.requests import Request, Sampling
from peftkit.serving.openai.asked import Chat, Text, read_chat, read_text
from peftkit.serving.openai.failures import Refused
from peftkit.serving.spec import ServeSpec

SPEC = ServeSpec(max_new_tokens=100, default_new_tokens=50)


def chat(**fields: Any) -> Chat:
    return read_chat(json.dumps({**CHAT, **fields}).encode(), SPEC)


def text(**fields: Any) -> Text:
    return read_text(json.dumps({**TEXT, **fields}).encode(), SPEC)


def called(identity: str | None, arguments: str) -> dict[str, Any]:
    call = {"id": identity, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def refused(call: Any, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        call(**fields)
    assert caught.value.status == 400
    return caught.value


def turns(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(turn) for turn in chat(messages=list(messages)).turns]


def test_everything_that_is_asked_for_is_in_the_request() -> None:
    asked = chat(
        max_tokens=None, max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=-5, stop=["a", "b"], n=2,
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=4, model="sql@prod",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
    )  # fmt: skip
    assert asked.like == Request(
        prompt=(), max_new_tokens=7, sampling=Sampling(0.5, 0.9, 3, -5), stop=("a", "b"), logprobs=4,
        json_schema={"type": "array"},
    )  # fmt: skip
    assert (asked.model, asked.n, asked.stream, asked.usage, asked.exact) == ("sql@prod", 2, True, True, True)
    assert text(seed=1, max_tokens=None, logprobs=3, stop="x").like == Request(
        prompt=(), max_new_tokens=50, sampling=Sampling(1.0, seed=1), stop=("x",), logprobs=3
    )


def test_what_is_not_said_has_openais_defaults_and_a_seed_of_its_own() -> None:
    first, second = chat(max_tokens=None), chat(max_tokens=None)
    assert first.like.sampling.temperature == 1.0
    assert first.like.sampling.top_p == 1.0
    assert (first.like.max_new_tokens, first.exact, first.n) == (50, False, 1)
    assert (first.like.logprobs, first.like.json_schema, first.like.stop) == (None, None, ())
    assert first.like.sampling.seed != second.like.sampling.seed


def test_null_is_the_same_as_absent() -> None:
    names = ["temperature", "top_p", "n", "stop", "stream", "tools", "response_format", "logit_bias", "seed", "store"]
    assert replace(chat(**dict.fromkeys(names)).like.sampling, seed=0) == replace(chat().like.sampling, seed=0)


@pytest.mark.parametrize("seed", [0, 5, -(2**63), 2**64 - 1])
def test_every_choice_has_a_seed_of_its_own_and_the_first_has_the_asked_one(seed: int) -> None:
    seeds = [each.sampling.seed for each in chat(seed=seed, n=3).choices()]
    assert seeds[0] == seed
    assert len(set(seeds)) == 3
    assert all(-(2**63) <= each < 2**64 for each in seeds)


def test_parts_roles_and_calls_become_what_templates_read() -> None:
    assert turns({"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}) == [
        {"role": "system", "content": "ab"}
    ]
    found = turns(*MESSAGES, CALLED, {"role": "tool", "tool_call_id": "c1", "content": "5"})
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found[2] == {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "f"}
    given_back = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "audio": None,
        "annotations": [],
        "tool_calls": None,
    }
    assert turns(given_back) == [{"role": "assistant", "content": "x"}]


def test_tools_and_their_choice() -> None:
    assert chat(tools=[TOOL]).tools.choice == "auto"
    assert chat(tools=[TOOL], tool_choice="none").tools.listed == ()
    assert chat(tools=[TOOL], parallel_tool_calls=False).tools.parallel is False
    forced = chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    assert (forced.tools.choice, forced.tools.only) == ("required", "f")
    assert forced.like.json_schema == chat(tools=[TOOL], tool_choice="required").like.json_schema
    assert forced.like.json_schema is not None
    assert chat(tools=[]).tools.choice == "none"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3))), ("", ("",))],
)
def test_prompts_of_all_four_kinds(prompt: Any, prompts: Any) -> None:
    assert text(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me"}, {"metadata": {"a": "b"}}, {"store": False}, {"service_tier": "flex"}, {"top_k": -1},
        {"safety_identifier": "x"}, {"prompt_cache_key": "x"}, {"presence_penalty": 0}, {"frequency_penalty": 0.0},
        {"logit_bias": {}}, {"min_p": 0}, {"repetition_penalty": 1.0}, {"modalities": ["text"]}, {"functions": []},
        {"response_format": {"type": "text"}}, {"n": 1.0}, {"reasoning_effort": "none"}, {"logprobs": False},
        {"prediction": {"type": "content", "content": "x"}}, {"parallel_tool_calls": True}, {"top_logprobs": 0},
    ],
)  # fmt: skip
def test_what_changes_no_answer_is_taken(fields: dict[str, Any]) -> None:
    assert replace(chat(seed=1, **fields).like) == chat(seed=1).like


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("presence_penalty", 0.5), ("frequency_penalty", -1), ("repetition_penalty", 1.1), ("logit_bias", {"5": 1}),
        ("min_p", 0.1), ("audio", {"voice": "x"}), ("modalities", ["audio"]), ("functions", [TOOL]), ("store", True),
        ("function_call", "auto"), ("reasoning_effort", "high"), ("verbosity", "low"), ("web_search_options", {}),
        ("moderation", {"model": "x"}), ("n", 0), ("n", 129), ("n", True), ("temperature", -0.1), ("temperature", 2.5),
        ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 2**31),
        ("seed", 2**64), ("seed", 1.5), ("seed", 1e308), ("stop", ["a"] * 5), ("stop", ""), ("stop", [""]),
        ("stop", [1]), ("stop", {}), ("max_tokens", 0), ("max_tokens", 101), ("stream", "yes"), ("stream_options", {}),
        ("top_logprobs", 21), ("top_logprobs", 2), ("response_format", "json"), ("model", ""), ("model", None),
        ("model", "x" * 301), ("model", 5),
        ("messages", []), ("messages", None), ("messages", "hi"), ("messages[0]", ["hi"]),
        ("tools", [TOOL, TOOL]), ("tool_choice", "required"), ("tool_choice", "sometimes"), ("tools[0]", ["f"]),
        ("response_format.type", {"type": "xml"}), ("response_format.json_schema", {"type": "json_schema"}),
        ("parallel_tool_calls", "no"), ("continue_final_message", True),
    ],
)  # fmt: skip
def test_what_cannot_be_heeded_is_refused_by_its_name(param: str, value: Any) -> None:
    error = refused(chat, **{param.partition("[")[0].partition(".")[0]: value})
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("messages[0].role", {"role": "robot", "content": "x"}),
        ("messages[0].role", {"content": "x"}),
        ("messages[0].content", {"role": "user"}),
        ("messages[0].content", {"role": "user", "content": 5}),
        ("messages[0].content[0].type", {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        ("messages[0].content[0].text", {"role": "user", "content": [{"type": "text"}]}),
        ("messages[0].content", {"role": "assistant", "content": None}),
        ("messages[0].tool_call_id", {"role": "tool", "content": "x"}),
        ("messages[0].tool_call_id", {"role": "tool", "content": "x", "tool_call_id": "c9"}),
        ("messages[0].colour", {"role": "user", "content": "x", "colour": "red"}),
        ("messages[0].refusal", {"role": "assistant", "content": "x", "refusal": "no"}),
        ("messages[0].tool_calls[0].id", called(None, "{}")),
        ("messages[0].tool_calls[0].function.arguments", called("c", "{")),
        ("messages[0].tool_calls[0].function.arguments", called("c", "[]")),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_read_are_named(param: str, message: dict[str, Any]) -> None:
    assert refused(chat, messages=[message]).param == param


@pytest.mark.parametrize(
    ("param", "tool"),
    [
        ("tools[0].type", {"type": "custom", "function": {"name": "f"}}),
        ("tools[0].function", {"type": "function"}),
        ("tools[0].function.name", {"type": "function", "function": {"name": "a b"}}),
        (
            "tools[0].function.parameters",
            {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}},
        ),
        ("tools[0].function.code", {"type": "function", "function": {"name": "f", "code": "x"}}),
    ],
)
def test_tools_that_cannot_be_read_are_named(param: str, tool: dict[str, Any]) -> None:
    assert refused(chat, tools=[tool]).param == param
    assert (
        refused(chat, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}).param == "tool_choice"
    )
    assert refused(chat, tools=[TOOL], response_format={"type": "json_object"}).param == "response_format"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": None}), ("prompt", {"prompt": []}), ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": 5}), ("prompt", {"prompt": ["a", 1]}), ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [True]}), ("prompt", {"prompt": ["a"] * 65, "n": 2}),
        ("echo", {"echo": True, "logprobs": 1}), ("best_of", {"best_of": 3}), ("suffix", {"suffix": "x"}),
        ("messages", {"messages": MESSAGES}), ("logprobs", {"logprobs": True}),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_heeded_are_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    assert refused(text, **fields).param == param


def test_all_problems_of_a_body_are_told_at_once_and_names_that_are_meant() -> None:
    error = refused(chat, temprature=1, top_p=5, messages=[{"role": "user", "contents": "x"}])
    for said in (
        "did you mean 'temperature'",
        "top_p is 5",
        "messages[0].content is missing",
        "did you mean 'content'",
    ):
        assert said in error.message
    assert error.message.startswith("4 problems")


def test_a_body_of_nothing_but_problems_is_answered_in_a_few_lines() -> None:
    error = refused(chat, messages=[5] * 100_000, **{f"key{at}": 1 for at in range(20_000)})
    assert len(error.message) < 5_000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON"), (b"{", "JSON"), (b"[]", "expected a JSON object"), (b'"x"', "expected a JSON object"),
        (b'{"temperature": NaN}', "NaN"), (b'{"n": 1, "n": 2}', "twice"), (b'{"model": "\\ud800"}', "half a character"),
        (b'{"seed": ' + b"9" * 400 + b"}", "too large"), (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[" * 100_000, "JSON"), (b'{"a":' * 150 + b"1" + b"}" * 150, "deeper than 100"), (b"\xff\xfe", "UTF-8"),
        (b'{"temperature": 1e999}', "too large"),
    ],
)  # fmt: skip
def test_what_is_no_sound_json_is_refused(body: bytes, said: str) -> None:
    for read in (read_chat, read_text):
        with pytest.raises(Refused, match=said) as caught:
            read(body, SPEC)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@given(changed(CHAT), changed(TEXT))
@settings(max_examples=100, deadline=None)
def test_any_body_is_read_or_refused(chat_body: dict[str, Any], text_body: dict[str, Any]) -> None:
    for read, body in ((read_chat, chat_body), (read_text, text_body)):
        error = None
        try:
            asked = read(json.dumps(body).encode(), SPEC)
            assert 1 <= asked.like.max_new_tokens <= 100
        except Refused as caught:
            error = caught
        if error is not None:
            assert error.status == 400
            assert error.code == "invalid_json" or (error.param is not None and error.param in error.message)
