"""Calls whose arguments stand between tags, as Qwen3-Coder's: nothing is escaped, and types are the schema's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from serving.calls_lab import form, no_hang, read, shipped, tool, written
from serving.tool_templates import GLM4, QWEN3_CODER, tokenizer_with

from peftkit.base.tokenizer import Tokenizer
from peftkit.serving.openai.calls import Reading
from peftkit.serving.openai.turns import Tools

TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
SHOP = Tools((tool("f", **{kind: kind for kind in TYPES}, city="string"), tool("g", n="integer")), "auto")
NAMES = ("f", "g")
_STAYS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Of templates that are here, and of one that is Qwen's own, whole."""
    folder = tmp_path_factory.mktemp("tagged")
    templates = {"coder": QWEN3_CODER, "glm4": GLM4, "qwen3_5": shipped("qwen3_5_nothink")}
    return {name: tokenizer_with(folder / name, text) for name, text in templates.items()}


@pytest.fixture(scope="module")
def coder(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["coder"]


def call(*parameters: str, name: str = "f") -> str:
    """A call as Qwen3-Coder writes it."""
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>\n"


# ---- there and back

_WORDS = ["a", "é", " ", "\n", "<", ">", "/", '"', "\\", "{", "null", "3", "<tool_call>", "</tool_call>", "</function>"]
_TEXT = st.text() | st.lists(st.sampled_from([*_WORDS, "<function=f>", "<|x|>"]), max_size=12).map("".join)
_NUMBER = st.floats(allow_nan=False, allow_infinity=False)
_INTEGER = st.integers(-(2**70), 2**70)
_JSON = st.recursive(
    st.none() | st.booleans() | _INTEGER | _NUMBER | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_VALUES = {
    "string": _TEXT,
    "integer": _INTEGER,
    "number": _NUMBER | _INTEGER,
    "boolean": st.booleans(),
    "object": st.dictionaries(st.text(), _JSON, max_size=3),
    "array": st.lists(_JSON, max_size=3),
    "null": st.none(),
}
_ARGUMENTS = st.fixed_dictionaries({}, optional={**_VALUES, "city": _TEXT})


@given(made=st.lists(st.tuples(st.just("f"), _ARGUMENTS), min_size=1, max_size=3), size=st.integers(1, 400))
@settings(_STAYS, max_examples=60)
def test_what_a_template_writes_is_read_with_its_types(
    tokenizers: dict[str, Tokenizer], made: list[tuple[str, dict[str, Any]]], size: int
) -> None:
    assume("<|im_end|>" not in json.dumps(made))
    for name, tokenizer in tokenizers.items():
        quoted = json.dumps(made, ensure_ascii=False)
        assume(not (name == "glm4" and "</tool_call>" in quoted))  # its only tag that ends a call
        content, found = read(tokenizer, written(tokenizer, made), SHOP, size)
        assert json.dumps(found) == json.dumps(made)  # as JSON has them: True is not 1
        assert re.sub("</?think>", "", content).strip() == ""


@given(before=_TEXT, inside=_ARGUMENTS, after=_TEXT, times=st.integers(1, 3))
@settings(_STAYS, max_examples=50)
def test_a_value_may_quote_whole_calls(
    coder: Tokenizer, before: str, inside: dict[str, Any], after: str, times: int
) -> None:
    """As who writes about tools does: the tags in a value close each other."""
    quoted = before + written(coder, [("f", inside)] * times) + after
    made = [("f", {"string": quoted, "city": "x"})]
    assert read(coder, written(coder, made), SHOP, 50) == ("", made)


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_however_it_comes_it_is_the_same(coder: Tokenizer, size: int) -> None:
    text = f"I look.\n{call(parameter('city', 'A <b>'), parameter('integer', '3'))}\n{call(name='g')} and so on"
    whole = read(coder, text, SHOP, 10_000)
    assert whole == ("I look.\n and so on", [("f", {"city": "A <b>", "integer": 3}), ("g", {})])
    assert read(coder, text, SHOP, size) == whole


def test_a_stream_holds_text_back_from_where_a_call_may_begin(coder: Tokenizer) -> None:
    reading = Reading(SHOP, form(coder))
    pieces = ("a <", "tool_cal", "X <fun", "ction", "al <tool_call>", "\n<function=f>")
    assert [reading.add(piece) for piece in pieces] == ["a", "", " <tool_calX", "", " <functional", ""]


# ---- what models do besides


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (call(parameter("city", "  Paris\n")), {"city": "  Paris\n"}),
        (call("<parameter=city>Paris</parameter>"), {"city": "Paris"}),
        (call("<parameter=city>\n</parameter>\n"), {"city": ""}),
        (call(parameter("city", "a </parameter> b")), {"city": "a </parameter> b"}),
        (call(parameter("city", "grep '<parameter=' x")), {"city": "grep '<parameter=' x"}),
        (call(parameter("city", "x <parameter=n> y")), {"city": "x <parameter=n> y"}),
        (call(parameter("city", call(parameter("n", "1")))), {"city": call(parameter("n", "1"))}),
        (call(parameter("city", "'<parameter=n>(.*)</parameter>' x")), {"city": "'<parameter=n>(.*)</parameter>' x"}),
        (call(parameter("city", "</function>\n</tool_call>")), {"city": "</function>\n</tool_call>"}),
        (call("<parameter=city>\nParis\n", parameter("integer", "3")), {"city": "Paris", "integer": 3}),
        (call(parameter("integer", "3"), "<parameter=city>\nParis\n"), {"city": "Paris", "integer": 3}),
        (call(parameter("other", "3")), {"other": "3"}),
        (call(parameter("integer", "many")), {"integer": "many"}),
        (call(parameter("city", "3"), parameter("integer", " 3 ")), {"city": "3", "integer": 3}),
        (call(parameter("city", "x")).removeprefix("<tool_call>\n"), {"city": "x"}),
        (call(parameter("city", "x")).removesuffix("\n</tool_call>"), {"city": "x"}),
        (call(parameter("city", "x")).replace("\n", "").replace("<f", "\n\n<f"), {"city": "x"}),
        (call(), {}),
        ("<tool_call><function=f></function></tool_call>", {}),
    ],
)
def test_a_call_is_read(coder: Tokenizer, text: str, arguments: dict[str, Any]) -> None:
    assert read(coder, text, SHOP, 5) == ("", [("f", arguments)])
    twice = read(coder, f"So:\n{text}\n{text}", SHOP, 5)
    assert twice == ("So:", [("f", arguments)] * 2)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=f>\n<parameter=city>\nPar",
        "<tool_call>\n<function=f>\n<parameter=city>\nParis\n</parameter>\n",  # there might have been another one
        "<tool_call>\n<function=f>\n",
        "<tool_call>",
        call(parameter("city", "x"), name="unknown"),
        call("<parameter=city\nx\n</parameter>\n"),
        call("Paris"),
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    ],
)
def test_what_is_no_whole_call_stays_text(coder: Tokenizer, text: str) -> None:
    assert read(coder, text, SHOP, 5) == (text, [])
    assert read(coder, f"{text}\n{call()}", SHOP, 5) == (text.rstrip(), [("f", {})])
    again = call(parameter("city", "Oslo"), parameter("integer", "4"))
    assert read(coder, f"{text}\n{again}", SHOP, 5) == (text.rstrip(), [("f", {"city": "Oslo", "integer": 4})])


WRITER = Tools((tool("f", code="string", to="string", n="integer"), tool("g")), "auto")


def glm(*arguments: tuple[str, str]) -> str:
    """A call as GLM-4.5 writes it."""
    pairs = (f"<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n" for name, value in arguments)
    return f"<tool_call>f\n{''.join(pairs)}</tool_call>"


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("coder", call(parameter("code", "use\n<parameter=x>\nto")), {"code": "use\n<parameter=x>\nto"}),
        (
            "coder",
            call(parameter("code", "use\n<parameter=x>\nto"), parameter("n", "3")),
            {"code": "use\n<parameter=x>\nto", "n": 3},
        ),
        (
            "coder",
            call(parameter("n", "3"), parameter("code", "a\n<parameter=n>\n9"), parameter("to", "b")),
            {"n": 3, "code": "a\n<parameter=n>\n9", "to": "b"},
        ),
        (
            "coder",
            call(parameter("code", "a\n<parameter=code>\n9")),
            {"code": "a\n<parameter=code>\n9"},
        ),
        ("coder", call("<parameter=code>\na\n", parameter("to", "b")), {"code": "a", "to": "b"}),
        (
            "coder",
            call(parameter("n", "3"), "<parameter=code>\na\n<parameter=to>\nb\n"),
            {"n": 3, "code": "a", "to": "b"},
        ),
        ("coder", call("<parameter=code>\nuse\n<parameter=x>\nto\n"), None),
        ("coder", call("<parameter=code>\nuse\n<parameter=x>\nto\n", parameter("n", "3")), None),
        ("coder", call(parameter("n", "1"), parameter("n", "2")), None),
        ("coder", call(parameter("x", "1"), parameter("n", "2"), parameter("x", "1")), None),
        ("coder", call(parameter("n", "1"), parameter("n", call(name="g"))), None),
        ("glm4", glm(("n", "3"), ("code", "a\n<arg_key>n</arg_key>\n<arg_value>9")),
         {"n": 3, "code": "a\n<arg_key>n</arg_key>\n<arg_value>9"}),
        ("glm4", glm(("code", "a\n<arg_key>n</arg_key>\n<arg_value>9"), ("n", "3")), None),
        ("glm4", glm(("code", "a\n<arg_key>x</arg_key>\n<arg_value>9"), ("n", "3")),
         {"code": "a\n<arg_key>x</arg_key>\n<arg_value>9", "n": 3}),
        ("glm4", glm(("n", "1"), ("n", "1")), None),
    ],
)  # fmt: skip
def test_no_call_is_half_right(
    tokenizers: dict[str, Tokenizer], name: str, text: str, arguments: dict[str, Any] | None
) -> None:
    """A tag that was left out is forgiven for an argument that is still awaited; what is given twice is no call."""
    again = glm(("to", "y")) if name == "glm4" else call(parameter("to", "y"))
    found = [] if arguments is None else [("f", arguments)]
    assert read(tokenizers[name], text, WRITER, 9) == ("" if found else text, found)
    content = "" if found else text
    assert read(tokenizers[name], f"{text}\n{again}", WRITER, 9) == (content, [*found, ("f", {"to": "y"})])


def test_one_call_at_most_when_several_are_not_wanted(coder: Tokenizer) -> None:
    one = Tools(SHOP.listed, "auto", parallel=False)
    assert read(coder, call(parameter("city", "x")) + call(), one) == ("", [("f", {"city": "x"})])


# ---- whatever comes

_MANY = 3_000
_OPEN = "".join(f"<function=f><parameter=a{at}>" for at in range(_MANY)) + "</parameter>" * _MANY
_GLM_OPEN = "".join(f"<tool_call>f<arg_key>a{at}</arg_key><arg_value>" for at in range(_MANY)) + "</arg_value>" * _MANY
_CODER_TAGS = ("<tool_call>", "<function=f>", "<function=", "<parameter=city>", "<parameter=", "</parameter>",
               "</function>", "</tool_call>")  # fmt: skip
_GLM_TAGS = ("<tool_call>f", "<arg_key>", "</arg_key>", "<arg_key>city</arg_key>", "<arg_value>", "</arg_value>")
HOSTILE = {
    "coder": [
        *(f"<function=f>{before}{tag * 10_000}" for tag in _CODER_TAGS for before in ("", "<parameter=city>")),
        *(f"<function=f>{before}{' ' * 100_000}" for before in ("", "<parameter=", "<parameter=city>", "</parameter>")),
        "<function=f><parameter=city>" + "\n" * 100_000 + "</parameter>",
        "<tool_call>\n<function=f>\n<parameter=city>\n" * 5_000,
        "<tool_call>\n<function=f>\n" + "<parameter=city>\n<parameter=\n</parameter>\n" * 5_000,
        "<tool_call>\n<function=f>\n<parameter=city>\n" + "</parameter>\n" * 10_000 + "</function>",
        "<function=f><parameter=city>" * 5_000 + "</function>",
        call() * 5_000,
        _OPEN + "".join(f"<parameter=x{at}>1</parameter>" for at in range(_MANY)),
        _OPEN + "<parameter=z>\n" + "<parameter=q>\n" * 10_000,
        "<function=f>\n<parameter=city>\n" + "<parameter=q>\n" * 10_000,
    ],
    "glm4": [
        *("<tool_call>f<arg_key>city</arg_key><arg_value>" + tag * 10_000 for tag in _GLM_TAGS),
        "<tool_call>f<arg_key>" * 20_000,
        "<tool_call>f<arg_key>" + "x" * 100_000,
        "<tool_call>f" + ("<arg_key>city</arg_key>" + " " * 50) * 2_000,
        _GLM_OPEN + "".join(f"<arg_key>x{at}</arg_key><arg_value>1</arg_value>" for at in range(_MANY)),
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HOSTILE.items() for text in texts])
def test_an_answer_takes_no_longer_than_its_length(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    """Half a second at most here; minutes where each tag looks through all that follows it."""
    reads = form(tokenizers[name])
    with no_hang(10):
        reads.read(text, SHOP.parameters)


def test_what_a_broken_call_quotes_is_no_call(coder: Tokenizer) -> None:
    """Who writes about calls does not mean them, whether there was room for the end or not."""
    quoting = call(parameter("string", call(parameter("integer", "3"), name="g")), parameter("city", "x"))
    for end in "</function>\n</tool_call>", "\n</parameter>\n</function>":
        broken = quoting[: quoting.rindex(end)]
        assert read(coder, broken, SHOP, 50) == (broken, [])
        assert read(coder, f"{broken}\n{call(name='g')}", SHOP, 50) == (broken.rstrip(), [("g", {})])


def test_what_is_not_declared_may_have_a_type_in_common(coder: Tokenizer) -> None:
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    tools = Tools(({"type": "function", "function": {"name": "f", "parameters": counts}},), "auto")
    assert read(coder, call(parameter("apples", "3")), tools, 9) == ("", [("f", {"apples": 3})])
