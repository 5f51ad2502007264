"""How templates write calls of tools is read off them, and answers are read by that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.calls_lab import AUTO, PLAIN, TOOLS, form, read, shipped, written
from serving.tool_templates import CONTROL, LLAMA3, MARKED, OTHERWISE, READABLE, XML, tokenizer_with
from tiny_bases import CHATML

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.template import Rendering
from peftkit.errors import DataError
from peftkit.generation.constrain import Grammar
from peftkit.generation.requests import Completion
from peftkit.serving.openai.call_forms import form_of, shown
from peftkit.serving.openai.calls import Reading, forced_call, forced_schema, new_id
from peftkit.serving.openai.turns import Tools

EMPTY: dict[str, Any] = {"type": "object", "properties": {}}
NAMES = ("zq_first", "zq_second")
ASKED = tuple({"type": "function", "function": {"name": name, "parameters": EMPTY}} for name in NAMES)
CALLS = [("f", {"city": "Málaga", "days": [1, 2]}), ("g-1", {"a": {"b": "}"}})]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: tokenizer_with(folder / name, text, CONTROL.get(name)) for name, text in READABLE.items()}


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_calls_are_read_as_the_template_writes_them(tokenizers: dict[str, Tokenizer], name: str, size: int) -> None:
    tokenizer = tokenizers[name]
    form = form_of(shown(tokenizer, PLAIN), tokenizer)
    for calls in CALLS[:1], CALLS[1:], CALLS:
        if name == "llama3" and len(calls) > 1:
            with pytest.raises(DataError, match="single tool-calls"):
                written(tokenizer, calls)
            continue
        text = written(tokenizer, calls, short=form.short_ids)
        content, found = read(tokenizer, text, size=size)
        assert found == calls
        assert content.replace("<think>", "").replace("</think>", "").strip() == ""


@pytest.mark.parametrize("name", ["hermes", "qwen3", "mistral-args", "deepseek", "function-tag", "qwen3-coder", "glm4"])
def test_text_before_calls_is_content(tokenizers: dict[str, Tokenizer], name: str) -> None:
    content, found = read(tokenizers[name], written(tokenizers[name], CALLS, "I < look."))
    assert found == CALLS
    assert content.rpartition("</think>")[2].strip() == "I < look."


def test_a_stream_gives_out_text_at_once_until_a_call_may_begin(tokenizers: dict[str, Tokenizer]) -> None:
    reading = Reading(AUTO, form(tokenizers["hermes"]))
    assert [reading.add(piece) for piece in ("a", " b ", "c <", "tool", " x", " <tool_call>", "{")] == [
        "a", " b", " c", "", " <tool x", "", "",
    ]  # fmt: skip


def test_json_is_a_call_at_the_beginning_only_where_nothing_stands_before_calls(
    tokenizers: dict[str, Tokenizer],
) -> None:
    said = '{"name": "f", "parameters": {"a": 1}}'
    assert read(tokenizers["llama3"], said) == ("", [("f", {"a": 1})])
    assert read(tokenizers["llama3"], f"Use {said}") == (f"Use {said}", [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}',  # cut off
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": 5}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}\n</tool_call>",
        "<tool_call>",
        "ends in <tool_ca",
    ],
)
def test_what_is_no_whole_call_stays_text(tokenizers: dict[str, Tokenizer], text: str) -> None:
    assert read(tokenizers["hermes"], text, size=50) == (text, [])


def test_a_broken_call_between_whole_ones_stays_text(tokenizers: dict[str, Tokenizer]) -> None:
    good, bad = '<tool_call>{"name": "f", "arguments": {}}</tool_call>', '<tool_call>{"name": 3}</tool_call>'
    content, calls = read(tokenizers["hermes"], f"{good}{bad}{good} and more")
    assert (content, calls) == (f"{bad} and more", [("f", {}), ("f", {})])


def test_a_mark_in_quotes_swallows_no_call(tokenizers: dict[str, Tokenizer]) -> None:
    """Behind it stands JSON, as it happens: a text that goes up to the call's first quote."""
    said = 'I put it between "<tool_call>" and its end:'
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read(tokenizers["hermes"], f"{said} {call}") == (said, [("f", {})])


def test_one_call_at_most_when_several_are_not_wanted(tokenizers: dict[str, Tokenizer]) -> None:
    text = written(tokenizers["hermes"], CALLS)
    assert read(tokenizers["hermes"], text, Tools(TOOLS, "auto", parallel=False)) == ("", CALLS[:1])


def test_without_tools_nothing_is_a_call(tokenizers: dict[str, Tokenizer]) -> None:
    text = written(tokenizers["hermes"], CALLS)
    assert read(tokenizers["hermes"], text, Tools()) == (text, [])


@given(text=st.text(st.sampled_from('<tool_call>/{}":fag, \n=prm'), max_size=60), size=st.integers(1, 9))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_lost_however_it_comes(tokenizers: dict[str, Tokenizer], text: str, size: int) -> None:
    for name in ("hermes", "llama3", "mistral-args", "function-tag", "qwen3-coder", "glm4"):
        content, calls = read(tokenizers[name], text, size=size)
        assert (content, calls) == read(tokenizers[name], text, size=10_000)
        assert calls or content == text


def test_ids_are_of_the_kind_that_the_template_takes_back(tokenizers: dict[str, Tokenizer]) -> None:
    assert {name for name, tokenizer in tokenizers.items() if shown(tokenizer, PLAIN).spelling.short_ids} == {"mistral"}
    ids = {new_id() for _ in range(50)}
    assert len(ids) == 50
    assert all(each.startswith("call_") for each in ids)
    assert all(len(new_id(short=True)) == 9 for _ in range(50))


@pytest.mark.parametrize(
    ("name", "begin", "arguments"),
    [
        ("qwen2_5", "<tool_call>", "arguments"),
        ("qwen3", "<tool_call>", "arguments"),
        ("llama3_1", "", "parameters"),
        ("llama3_2", "", "parameters"),
        ("deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", None),
        ("qwen3_5_think", "<function=", None),
        ("qwen3_5_nothink", "<function=", None),
        ("qwen3_6", "<function=", None),
        ("qwen3_8", "<function=", None),
        ("nemotron_3_nano", "<function=", None),
        ("nemotron_3_ultra", "<function=", None),
        ("glm4moe", "<tool_call>", None),
    ],
)
def test_templates_that_ship_with_trl_are_read(tmp_path: Path, name: str, begin: str, arguments: str | None) -> None:
    tokenizer = tokenizer_with(tmp_path, shipped(name))
    found_form = form(tokenizer)
    assert found_form.begin == begin
    assert (found_form.inside.arguments if found_form.inside else None) == ((arguments,) if arguments else None)
    taken = shown(tokenizer, PLAIN)
    assert taken.spelling.text_arguments == (name == "deepseekv3")
    said = read(tokenizer, taken.two or taken.one, Tools(ASKED, "auto"))
    assert said == ("", [(name, {"zq_key": "zq_value"}) for name in NAMES[: 2 if taken.two else 1]])


def test_a_turn_with_calls_may_end_in_a_token_of_its_own(tmp_path: Path) -> None:
    """As Llama 3.1 ends them in <|eom_id|>: what follows the call is no part of how it is written."""
    tokenizer = tokenizer_with(tmp_path, LLAMA3.replace("{{ '}<|im_end|>' }}", "{{ '}<|endoftext|>' }}"))
    tokenizer = replace(tokenizer, stop_ids=(2, 0))
    assert form(tokenizer).end == ""
    assert read(tokenizer, '{"name": "f", "parameters": {}}') == ("", [("f", {})])


def test_a_template_that_names_the_function_before_the_call_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, shipped("muse_glimmer"))
    with pytest.raises(DataError, match="nothing stands before the name"):
        form(tokenizer)


@pytest.mark.parametrize("template", [XML, MARKED, OTHERWISE, CHATML, None])
def test_templates_that_cannot_be_read_are_refused(tmp_path: Path, template: str | None) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(DataError):
        form_of(shown(tokenizer, PLAIN), tokenizer)
    if template in (XML, MARKED, OTHERWISE):
        assert shown(tokenizer, PLAIN).one.startswith("<")
    else:
        with pytest.raises(DataError):
            shown(tokenizer, PLAIN)


def test_plain_rendering_knows_no_tools(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(DataError):
        shown(tokenizers["hermes"], Rendering(template="plain"))


def test_an_answer_that_must_be_a_call_follows_its_schema(tokenizers: dict[str, Tokenizer]) -> None:
    city = {"$defs": {"c": {"enum": ["Paris", "Rome"]}}, "type": "object", "required": ["city"],
            "properties": {"city": {"$ref": "#/$defs/c"}}, "additionalProperties": False}  # fmt: skip
    listed = (TOOLS[0], {"type": "function", "function": {"name": "where", "parameters": city}})
    tokenizer = tokenizers["hermes"]
    grammar = Grammar.of(forced_schema(Tools(listed, "required")), tokenizer)

    def allowed(text: str) -> bool:
        constraint = grammar.start()
        for token in tokenizer.encode(text):
            if not constraint.mask(300)[token]:
                return False
            constraint.accept(token)
        return constraint.may_stop

    assert allowed('{"name": "where", "arguments": {"city": "Rome"}}')
    assert allowed('{"name": "f", "arguments": {}}')
    assert not allowed('{"name": "where", "arguments": {"city": "Oslo"}}')
    assert not allowed('{"name": "where", "arguments": {}}')
    assert not allowed('{"name": "h", "arguments": {}}')
    assert list(Tools(listed, "required", "f").parameters) == ["f"]


def test_a_forced_call_is_whole_or_text() -> None:
    names = frozenset({"f"})
    found = forced_call(' {"name": "f", "arguments": {"a": 1}} ', names)
    assert found is not None
    assert (found.name, json.loads(found.arguments)) == ("f", {"a": 1})
    for broken in (
        '{"name": "f", "arguments": {',
        '{"name": "g", "arguments": {}}',
        '{"name": "f", "arguments": []}',
        "",
    ):
        assert forced_call(broken, names) is None
    reading = Reading(Tools(TOOLS, "required"), None)
    assert reading.add('{"name": "f"') == ""
    assert reading.finish(Completion("", [], False, "length"), None) == ('{"name": "f"', [])  # type: ignore[arg-type]
