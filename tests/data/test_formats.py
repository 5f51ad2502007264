"""Records become rows without a change to any text, or every problem is told at once with its place."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from peftkit.data.formats import FORMATS, LISTED, Dataset, convert, load_rows
from peftkit.data.readers import Records, Where
from peftkit.errors import ConfigError, DataError

said = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
dialogues = st.lists(st.tuples(said, said), min_size=1, max_size=4)
AS_USER, AS_GPT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def records(rows: Sequence[dict[str, Any]]) -> Records:
    return Records(tuple((Where("a.jsonl", at + 1, at), row) for at, row in enumerate(rows)), "a.jsonl", "0" * 64)


def rows_of(*rows: dict[str, Any], format: str = "auto") -> Dataset:
    return convert(records(rows), format)


def refused(*rows: dict[str, Any], format: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        rows_of(*rows, format=format)
    return str(caught.value)


def chat(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def openai(pairs: list[tuple[str, str]], system: str | None = None) -> tuple[dict[str, str], ...]:
    turns = [{"role": "system", "content": system}] if system else []
    for asked, answer in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return tuple(turns)


# --- the same conversation in every format -------------------------------------------------------------------------


@settings(deadline=None)
@given(dialogues, st.none() | said, st.booleans())
def test_a_conversation_is_the_same_from_every_format(
    pairs: list[tuple[str, str]], system: str | None, column: bool
) -> None:
    expected = openai(pairs, system)
    back = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": back[turn["role"]], "value": turn["content"]} for turn in expected]
    beside = {"system": system} if column and system else {}
    start = 1 if beside else 0
    (*history, (asked, answer)) = pairs
    forms: dict[str, dict[str, Any]] = {
        "messages": {"messages": list(expected[start:]), **beside},
        "sharegpt": {"conversations": shared[start:], **beside},
        "alpaca": {"instruction": asked, "input": "", "output": answer, "system": system, "history": history},
        "prompt_completion": {"prompt": list(expected[start:-1]), "completion": [expected[-1]], **beside},
    }
    for format, row in forms.items():
        found = rows_of(row)
        assert found.format == format
        assert found.rows[0].messages == expected
        assert found.rows[0].text is None
        nested = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        if format != "prompt_completion":  # there a string is a prompt, whatever it looks like
            assert rows_of(nested).rows[0].messages == expected  # as csv holds it


@settings(deadline=None)
@given(said, said, said)
def test_no_text_is_trimmed_or_edited(first: str, second: str, third: str) -> None:
    row = rows_of({"instruction": first, "input": second, "output": third}).rows[0]
    assert [turn["content"] for turn in row.messages] == [f"{first}\n{second}", third]
    assert rows_of({"text": first}).rows[0].text == first
    for pair in (("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("instruction", "response")):
        assert rows_of(dict(zip(pair, (first, second), strict=True))).rows[0].messages == openai([(first, second)])
    parts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
    joined = rows_of(chat({"role": "user", "content": parts}, AS_GPT)).rows[0]
    assert joined.messages[0]["content"] == first + second


def test_think_blocks_and_reasoning_stay_as_they_are() -> None:
    answer = {"role": "assistant", "content": "<think>\n hm \n</think>\n\n yes ", "reasoning_content": " because "}
    assert rows_of(chat(AS_USER, answer)).rows[0].messages == (AS_USER, answer)


@settings(deadline=None)
@given(st.integers(1, 30), st.data())
def test_every_record_becomes_the_row_at_its_place(count: int, data: Any) -> None:
    answers = data.draw(st.lists(said, min_size=count, max_size=count))
    found = rows_of(*({"prompt": f"{at}", "completion": answer, "id": at} for at, answer in enumerate(answers)))
    assert [row.messages[1]["content"] for row in found.rows] == answers
    assert [row.columns for row in found.rows] == [{"id": at} for at in range(count)]
    assert [row.where.line for row in found.rows] == list(range(1, count + 1))


def test_an_empty_input_adds_nothing_and_an_empty_instruction_leaves_the_input() -> None:
    assert rows_of({"instruction": "i", "input": "", "output": "o"}).rows[0].messages == openai([("i", "o")])
    assert rows_of({"instruction": "i", "input": None, "output": "o"}).rows[0].messages == openai([("i", "o")])
    assert rows_of({"instruction": "", "input": "x", "output": "o"}).rows[0].messages == openai([("x", "o")])


def test_columns_tools_and_template_settings_are_kept() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    row = chat(AS_USER, AS_GPT, tools=json.dumps([tool]), chat_template_kwargs='{"thinking": true}', slice="x", n=None)
    found = rows_of(row, chat(AS_USER, AS_GPT, tools=[tool]), chat(AS_USER, AS_GPT, tools="", slice="y"))
    assert [one.tools for one in found.rows] == [(tool,), (tool,), None]
    assert [one.chat_template_kwargs for one in found.rows] == [{"thinking": True}, {}, {}]
    assert [one.columns for one in found.rows] == [{"slice": "x", "n": None}, {}, {"slice": "y"}]
    assert "other columns are kept beside the rows: 'slice', 'n'" in found.reason


# --- tool calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ['{"city": "Bern"}', {"city": "Bern"}], ids=["string", "object"])
def test_tool_calls_come_out_in_one_shape(arguments: Any) -> None:
    inner = {"name": "weather", "arguments": arguments}
    result = {"role": "tool", "content": "", "tool_call_id": "c1"}
    full = {"id": "c1", "type": "function", "function": inner}
    expected = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]
    for calls in ([full], json.dumps([full]), [{"id": "c1", **inner}]):
        asks = {"role": "assistant", "content": None, "tool_calls": calls}
        row = rows_of(chat(AS_USER, asks, result, result, AS_GPT)).rows[0]
        assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": expected}
        assert row.messages[2] == result


def test_function_calls_of_sharegpt_become_tool_calls() -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Bern"}})
    function = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    turns = [("human", "q"), ("function_call", call), ("observation", "12"), ("function_call", f"[{call}, {call}]"),
             ("tool", "1"), ("tool", "2"), ("gpt", "a")]  # fmt: skip
    row = rows_of({"conversations": [{"from": who, "value": value} for who, value in turns]}).rows[0]
    assert " ".join(turn["role"] for turn in row.messages) == "user assistant tool assistant tool tool assistant"
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [function]}
    assert row.messages[3]["tool_calls"] == [function, function]


def test_nulls_that_parquet_fills_in_are_no_entries(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    rows = [
        chat(AS_USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "noon", "tool_call_id": "c1"}, AS_GPT),
        chat({"role": "system", "content": "s"}, AS_USER, AS_GPT),
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = load_rows(tmp_path / "a.parquet")
    assert found.rows[1].messages == ({"role": "system", "content": "s"}, AS_USER, AS_GPT)
    assert found.rows[0].messages[0] == AS_USER
    assert found.rows[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {}
    assert str(found.rows[1].where) == "a.parquet[1]"


# --- which format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"instruction": "i", "output": "o"}, "alpaca", "every row has 'instruction' and 'output'"),
        ({"instruction": "i", "output": "o", "text": "i o"}, "alpaca", "every row has 'instruction' and 'output'"),
        ({"prompt": "p", "messages": [AS_USER, AS_GPT]}, "messages", "every row has 'messages'"),
        ({"messages": None, "prompt": "p", "completion": "c"}, "prompt_completion", "every row has 'prompt' and"),
        ({"question": "q", "answer": "a", "id": 1}, "prompt_completion", "'question' and 'answer', read as prompt and"),
        ({"text": "t", "label": 1}, "text", "every row has 'text'"),
    ],
)
def test_the_format_is_found_and_explained(row: dict[str, Any], format: str, reason: str) -> None:
    found = rows_of(row, row)
    assert found.format == format
    assert reason in found.reason


def test_mixed_formats_are_counted_with_the_first_place_of_each() -> None:
    alpaca = {"instruction": "i", "output": "o"}
    message = refused(alpaca, alpaca, {"text": "t"}, alpaca, {"instruction": "i", "ouput": "o"})
    assert "rows of different formats" in message
    assert "- 3 rows: alpaca, first at a.jsonl:1" in message
    assert "- 1 rows: text, first at a.jsonl:3" in message
    assert "- 1 rows: no known format, first at a.jsonl:5" in message
    assert "column 'ouput' – did you mean 'output'?" in message


def test_rows_of_two_formats_at_once_must_be_told_apart_by_the_user() -> None:
    row = {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"}
    assert "say which: format=alpaca or format=prompt_completion" in refused(row)
    assert rows_of(row, format="prompt_completion").rows[0].messages == openai([("p", "c")])
    assert rows_of(row, format="alpaca").rows[0].columns == {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "i", "ouput": "o"}, "nearest format: alpaca (instruction, output): column 'ouput' – did you"),
        ({"instruction": "i", "input": "o"}, "nearest format: alpaca (instruction, output): 'output' is missing"),
        ({"mesages": []}, "column 'mesages' – did you mean 'messages'?"),
        ({"question": "q", "answer": "a", "context": "c"}, "unclear where 'context' belong: say format=prompt_comp"),
        ({"text": "t", "instruction": "i"}, "unclear where 'instruction' belong: say format=text"),
        ({"x": 1, "y": 2}, "columns 'x', 'y'"),
        ({}, "columns (none)"),
    ],
)
def test_an_unknown_format_names_the_nearest_and_the_edit(row: dict[str, Any], said: str) -> None:
    message = refused(row)
    assert "rows in no known format" in message
    assert said in message


def test_what_detection_leaves_open_can_be_asked_for() -> None:
    row = {"question": "q", "answer": "a", "context": "c"}
    found = rows_of(row, format="prompt_completion")
    assert found.rows[0].messages == openai([("q", "a")])
    assert found.rows[0].columns == {"context": "c"}
    assert found.reason.startswith("as asked, from 'question' and 'answer'")
    assert rows_of({"text": "t", "instruction": "i"}, format="text").rows[0].text == "t"


def test_a_format_asked_for_that_does_not_fit_says_what_is_missing() -> None:
    message = refused({"prompt": "p", "completion": "c"}, format="alpaca")
    assert "a.jsonl:1: instruction: found no 'instruction', 'output', expected alpaca" in message
    assert "nearest format: prompt_completion" in message
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        rows_of({"text": "t"}, format="alpca")


def test_a_csv_without_a_header_gets_the_hint(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("good film\t1\nbad film\t0\n")
    with pytest.raises(DataError, match="put a header line above it"):
        load_rows(tmp_path / "a.tsv")


def test_every_format_is_known_by_name() -> None:
    assert FORMATS == ("alpaca", "sharegpt", "messages", "prompt_completion", "text")


# --- problems of rows ----------------------------------------------------------------------------------------------

CALL = {"id": "c1", "function": {"name": "f", "arguments": {}}}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown role": (
        chat({"role": "usr", "content": "q"}, AS_GPT),
        ["messages[0].role: found 'usr', expected one of system, user, assistant, tool (did you mean 'user'?)"],
    ),
    "developer": (chat({"role": "developer", "content": "q"}, AS_USER, AS_GPT), ["(did you mean 'system'?)"]),
    "role null": (chat({"role": None, "content": "q"}, AS_GPT), ["messages[0].role: found null"]),
    "unknown speaker": (
        {"conversations": [{"from": "usr", "value": "q"}, {"from": "bot", "value": "a"}]},
        ["conversations[0].from: found 'usr'", "(did you mean 'human'?)", "found 'bot'", "(did you mean 'gpt'?)"],
    ),
    "empty answer": (chat(AS_USER, {"role": "assistant", "content": " \n"}), ["messages[1].content: found an empty"]),
    "empty output": ({"instruction": "i", "output": ""}, ["output: found an empty text ('')"]),
    "nothing asked": ({"instruction": "", "output": "o"}, ["instruction: found an empty text"]),
    "empty text": ({"text": " "}, ["text: found an empty text"]),
    "null output": ({"instruction": "i", "output": None}, ["output: found null, expected a text"]),
    "null content": (chat(AS_USER, {"role": "assistant", "content": None}), ["messages[1].content: found null"]),
    "number": ({"prompt": "p", "completion": 3}, ["completion: found 3, expected a text"]),
    "no content": (chat({"role": "user"}, AS_GPT), ["messages[0].content: found null"]),
    "no assistant": (chat(AS_USER), ["messages: found no assistant message (nothing to learn)"]),
    "no turns": (chat(), ["messages: found no assistant message (nothing to learn)"]),
    "unanswered": (chat(AS_USER, AS_GPT, AS_USER), ["messages[2]: found a user message at the end"]),
    "two systems": (
        chat({"role": "system", "content": "s"}, {"role": "system", "content": "s"}, AS_USER, AS_GPT),
        ["messages[1]: found a second system message"],
    ),
    "system column and turn": (
        chat({"role": "system", "content": "s"}, AS_USER, AS_GPT, system="t"),
        ["messages[0]: found a second system message"],
    ),
    "late system": (
        chat(AS_USER, {"role": "system", "content": "s"}, AS_GPT),
        ["messages[1]: found a system message as message 2"],
    ),
    "two users": (chat(AS_USER, AS_USER, AS_GPT), ["messages[1]: found two user messages in a row"]),
    "two answers": (chat(AS_USER, AS_GPT, AS_GPT), ["messages[2]: found two assistant messages in a row"]),
    "tool first": (
        chat(AS_USER, {"role": "tool", "content": "t"}, AS_GPT),
        ["messages[1]: found a tool result after user"],
    ),
    "unknown call id": (
        chat(
            AS_USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "t", "tool_call_id": "c9"},
            AS_GPT,
        ),
        ["messages[2].tool_call_id: found 'c9', expected the id of a call: 'c1'"],
    ),
    "arguments not json": (
        chat(AS_USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}),
        ["messages[1].tool_calls[0].function.arguments: found '{x', expected an object"],
    ),
    "arguments a list": (
        chat(AS_USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        ["function.arguments: found '[1]', expected an object"],
    ),
    "argument twice": (
        chat(AS_USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}),
        ['function.arguments: found \'{"a": 1, "a": 2}\''],
    ),
    "call without a name": (
        chat(AS_USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}),
        ["messages[1].tool_calls[0]: found", "with a name"],
    ),
    "function_call not json": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "now()"}]},
        ["conversations[1].value: found 'now()'"],
    ),
    "calls by the user": (
        chat({"role": "user", "content": "q", "tool_calls": [CALL]}, AS_GPT),
        ["messages[0].tool_calls: found tool calls by user"],
    ),
    "old function_call": (
        chat(AS_USER, {"role": "assistant", "content": "a", "function_call": {}}),
        ["messages[1].function_call", "'tool_calls', which took its place"],
    ),
    "image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, AS_GPT),
        ["messages[0].content[0]: found a part of type 'image_url', expected parts of type 'text'"],
    ),
    "audio": (chat({"role": "user", "content": [{"type": "input_audio"}]}, AS_GPT), ["a part of type 'input_audio'"]),
    "sharegpt turns": (
        chat({"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}),
        ["messages[0]: found", "nearest format: sharegpt; rename the column to 'conversations'"],
    ),
    "messages turns": (
        {"conversations": [AS_USER, AS_GPT]},
        ["conversations[0]: found", "nearest format: messages; rename the column to 'messages'"],
    ),
    "both spellings": (
        {"conversations": [{"from": "human", "value": "q", "role": "user"}, {"from": "gpt", "value": "a"}]},
        ["conversations[0].role: found an entry 'role' beside 'from' and 'value'"],
    ),
    "misspelt entry": (
        chat(AS_USER, {**AS_GPT, "reasoning_contents": "r"}),
        ["messages[1]: found an entry 'reasoning_contents'", "did you mean 'reasoning_content'?"],
    ),
    "misspelt column": (
        {"instruction": "i", "imput": "x", "output": "o"},
        ["imput: found a column 'imput'", "(did you mean 'input'?)"],
    ),
    "messages not a list": ({"messages": "hello"}, ["messages: found 'hello', expected a list"]),
    "messages null": ({"messages": None}, ["messages: found null, expected a list"]),
    "turn not an object": (chat("hello", AS_GPT), ["messages[0]: found 'hello'"]),  # type: ignore[arg-type]
    "history not pairs": ({"instruction": "i", "output": "o", "history": [["a"]]}, ["history[0]: found ['a']"]),
    "text and list": ({"prompt": "p", "completion": [AS_GPT]}, ["completion: found [{", "expected a text"]),
    "tools not a list": (chat(AS_USER, AS_GPT, tools={"a": 1}), ["tools: found {'a': 1}, expected a list"]),
    "tool not an object": (chat(AS_USER, AS_GPT, tools=["now"]), ["tools[0]: found 'now'"]),
    "kwargs not an object": (chat(AS_USER, AS_GPT, chat_template_kwargs="yes"), ["chat_template_kwargs: found 'yes'"]),
    "half a character": ({"prompt": "p", "completion": "a\ud83d"}, ["completion: found half a surrogate pair"]),
    "reasoning not a text": (chat(AS_USER, {**AS_GPT, "reasoning_content": 1}), ["reasoning_content: found 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_told_with_its_place_and_field(case: str) -> None:
    row, expected = BAD[case]
    message = refused(row)
    assert all(part in message for part in expected), message
    assert "- a.jsonl:1: " in message
    # no problem is told twice: as many lines as problems, and nothing that only follows from another one
    assert message.count("\n- ") == (2 if case in ("unknown speaker", "sharegpt turns", "messages turns") else 1), (
        message
    )


def test_all_problems_are_counted_and_the_first_are_listed() -> None:
    good = {"instruction": "i", "output": "o"}
    bad: list[dict[str, Any]] = [{"instruction": "", "output": ""} for _ in range(LISTED)]
    message = refused(good, *bad, good)
    assert f"{2 * LISTED} problems in {LISTED} of {LISTED + 2} rows, read as alpaca" in message
    assert message.count("- a.jsonl:") == LISTED
    assert f"- and {LISTED} more" in message
    assert "a.jsonl:1:" not in message


def test_a_preference_set_is_named_as_such() -> None:
    assert "preference set" in refused(
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "", "rejected": ""}
    )


def test_what_is_kept_but_not_used_is_announced() -> None:
    weighed = {**AS_GPT, "weight": 0}
    found = rows_of(chat(AS_USER, weighed, AS_USER, weighed))
    assert found.rows[0].messages[1] == weighed
    assert "messages keep an entry 'weight', which only a chat template may read (2 times)" in found.reason
    found = rows_of({"prompt": [AS_USER, AS_GPT, AS_USER], "completion": [AS_GPT]})
    assert "an answer inside 'prompt' counts as one to learn" in found.reason


junk: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({})
)
speakers = st.sampled_from(["user", "assistant", "tool", "human", "gpt", "function_call", "system"])
any_turn = st.fixed_dictionaries(
    {},
    optional={
        "role": speakers | junk,
        "from": speakers | junk,
        "content": st.text() | junk | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()})),
        "value": st.text() | junk,
        "tool_calls": st.lists(st.dictionaries(st.sampled_from(["function", "name", "arguments", "id"]), junk)) | junk,
        "tool_call_id": junk,
    },
)
columns = st.sampled_from(
    ["instruction", "input", "output", "messages", "conversations", "prompt", "completion", "text", "system", "tools"]
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(columns, junk | st.lists(any_turn | junk)), st.sampled_from(["auto", *FORMATS]))
def test_any_record_gives_a_row_or_a_data_error(record: dict[str, Any], format: str) -> None:
    try:
        row = rows_of(record, format=format).rows[0]
    except DataError:
        return
    assert (row.text is None) == bool(row.messages)
    assert row.text is not None or any(turn["role"] == "assistant" for turn in row.messages)
    assert all(isinstance(turn["content"], str) for turn in row.messages)


# --- real files ----------------------------------------------------------------------------------------------------

DATA = os.environ.get("PEFTKIT_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="PEFTKIT_TEST_DATA is not set: real files not read")


@real
@pytest.mark.parametrize(
    ("file", "rows", "format"),
    [
        ("rasbt_instruction/instruction-data.json", 1100, "alpaca"),
        ("rasbt_instruction/instruction-data-with-preference.json", 1100, "alpaca"),
        ("llamafactory_demo/alpaca_en_demo.json", 999, "alpaca"),
        ("llamafactory_demo/alpaca_zh_demo.json", 1000, "alpaca"),
        ("llamafactory_demo/identity.json", 91, "alpaca"),
        ("gsm8k/test.jsonl", 1319, "prompt_completion"),
    ],
)
def test_real_files_keep_every_row_and_every_text(file: str, rows: int, format: str) -> None:
    path = Path(DATA or "") / file
    found = load_rows(path)
    assert (found.format, len(found.rows)) == (format, rows)
    text = path.read_text("utf-8")
    raw = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    asked, answer = ("question", "answer") if "gsm8k" in file else ("instruction", "output")
    for row, record in zip(found.rows, raw, strict=True):
        below = record.get("input")
        assert row.messages == openai([(record[asked] + (f"\n{below}" if below else ""), record[answer])])
        line = text.split("\n")[(row.where.line or 0) - 1]
        assert line.lstrip().startswith("{")


@real
def test_real_prompts_and_completions_keep_their_ends() -> None:
    files = sorted(Path(DATA or "").glob("t0_tasks/*.jsonl"))
    assert len(files) == 15
    for path in files:
        found = load_rows(path)
        assert (found.format, len(found.rows)) == ("prompt_completion", 200)
        raw = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        assert [row.messages for row in found.rows] == [openai([(one["prompt"], one["completion"])]) for one in raw]
        assert all(row.messages[1]["content"].endswith("<|endoftext|>") for row in found.rows)


@real
def test_real_files_that_are_no_rows_to_learn_from_are_refused() -> None:
    with pytest.raises(DataError, match=r"300 problems in 300 of 300 rows(.|\n)*preference set"):
        load_rows(Path(DATA or "") / "llamafactory_demo/dpo_en_demo.json")
    for file in ("sst2/dev.tsv", "ag_news/test.csv", "e2e_nlg/devset.csv", "xquad/xquad.en.json"):
        with pytest.raises(DataError, match="in no known format"):
            load_rows(Path(DATA or "") / file)


@real
def test_a_real_set_survives_csv(tmp_path: Path) -> None:
    source = Path(DATA or "") / "llamafactory_demo/alpaca_en_demo.json"
    raw = json.loads(source.read_text("utf-8"))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["instruction", "input", "output"])
    writer.writeheader()
    writer.writerows(raw)
    (tmp_path / "a.csv").write_bytes(out.getvalue().encode())
    assert [row.messages for row in load_rows(tmp_path / "a.csv").rows] == [
        row.messages for row in load_rows(source).rows
    ]
