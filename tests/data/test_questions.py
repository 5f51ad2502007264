"""Rows that are asked: read as training reads them, with or without their answer."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.formats import load_rows
from peftkit.data.questions import look_through
from peftkit.errors import DataError

SYSTEM = {"role": "system", "content": "be brief"}
ASKS = {"role": "user", "content": "why?"}
SAYS = {"role": "assistant", "content": "because"}
TOOL = {"role": "tool", "content": "42"}
WITH_ANSWERS: list[dict[str, Any]] = [
    {"instruction": "Sum.", "input": "1 2", "output": "3", "system": "be brief", "id": 7},
    {"instruction": "Sum.", "output": "3", "history": [["a", "b"]], "kind": "x"},
    {"instruction": "Sum.", "response": "3"},
    {"prompt": "why?", "completion": "because", "kind": "x"},
    {"prompt": "why?", "response": "because"},
    {"prompt": [SYSTEM, ASKS], "completion": [SAYS]},
    {"question": "why?", "answer": "because"},
    {"messages": [SYSTEM, ASKS, SAYS, {**ASKS, "content": "and?"}, SAYS], "tools": "[]"},
    {"messages": [ASKS, {**SAYS, "tool_calls": [{"name": "f", "arguments": "{}"}]}, TOOL, SAYS]},
    {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]},
]
ANSWERS = ("output", "completion", "response", "answer")


def written(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def without_answer(record: dict[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in record.items() if key not in ANSWERS}
    return left | {key: left[key][:-1] for key in ("messages", "conversations") if key in left}


@pytest.mark.parametrize("record", WITH_ANSWERS)
def test_a_row_is_asked_as_training_reads_it(record: dict[str, Any], tmp_path: Path) -> None:
    """The oracle is the reader for training: all before the answer, columns beside it apart."""
    file = written(tmp_path, record)
    (learnt,) = load_rows(file).rows
    for asked in (file, written(tmp_path, without_answer(record), name="bare.jsonl")):
        questions = look_through(asked)
        ((row, name),) = questions
        assert row.messages[:-1] == learnt.messages[:-1]
        assert row.messages[-1]["role"] == "assistant"
        assert (row.tools, row.chat_template_kwargs, row.columns) == (learnt.tools, {}, learnt.columns)
        assert (questions.count, name) == (1, None)
    assert questions.left_out == tuple(learnt.columns)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_answer_is_none(empty: str | None, tmp_path: Path) -> None:
    for key, answer in (("instruction", "output"), ("prompt", "completion"), ("question", "answer")):
        ((row, _),) = look_through(written(tmp_path, {key: "why?", answer: empty}))
        assert row.messages[:-1] == (ASKS,)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    records = [{"prompt": f"line {i}\u2028?", "kind": "x"} for i in range(3)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(records))
    with open(tmp_path / "d.csv", "w", newline="") as stream:
        table = csv.DictWriter(stream, ["prompt", "kind"])
        table.writeheader()
        table.writerows(records)
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.csv"):
        assert [row.messages[0]["content"] for row, _ in look_through(tmp_path / name)] == [
            record["prompt"] for record in records
        ], name


def test_a_column_says_who_is_asked(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "who": "one"},
        {"prompt": "b", "who": ""},
        {"prompt": "c", "who": None},
    ]
    questions = look_through(written(tmp_path, *rows, {"prompt": "d", "who": "one"}), "who")
    assert [name for _, name in questions] == ["one", None, None, "one"]
    assert {name: where.line for name, where in questions.names.items()} == {"one": 1, None: 2}
    assert questions.left_out == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n{"prompt": ""}\n', "2 of 3 rows cannot be asked"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "rows.jsonl:2"),
        ('{"instruction": "a", "context": "b", "response": "c"}\n', "no column is known to be the question"),
        ('{"text": "a"}\n', "no column is known to be the question"),
        ('{"messages": [], "prompt": "a"}\n', "keep one of the columns messages, prompt"),
        ('{"messages": [{"role": "system", "content": "a"}]}\n', "nobody asks anything"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "nobody asks anything"),
        ('{"prompt": "a"}\n{"prompt": "b\n', "rows.jsonl:2"),
        ('{"prompt": "a", "prompt": "b"}\n', "given twice"),
        ('{"prompt": "a"}\n[1]\n', "a row is list"),
        ("\n \n", "holds no rows"),
    ],
)
def test_what_cannot_be_asked_is_told_at_once(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        look_through(tmp_path / "rows.jsonl")
    assert said in str(caught.value)


def test_rows_of_other_columns_than_the_first_are_named(tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "a"}, {"question": "b", "answer": "c"})
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: prompt: found no such column, only 'question'.*split the file"
    ):
        look_through(file)


@pytest.mark.parametrize("changed", ['{"prompt": "more"}\n', '{"prompt": "a", "who": "two"}\n', '{"who": "one"}\n'])
def test_other_rows_than_were_looked_through_are_never_given_out(changed: str, tmp_path: Path) -> None:
    asked = look_through(written(tmp_path, {"prompt": "a", "who": "one"}), "who")
    kept = asked.path.read_text() if "more" in changed else ""
    asked.path.write_text(kept + changed.replace('"more"', '"more", "who": "one"'))
    with pytest.raises(DataError, match="was changed"):
        list(asked)


@pytest.mark.parametrize(
    ("row", "said"), [({"prompt": "b"}, "no column 'who'"), ({"prompt": "b", "who": 3}, "found 3")]
)
def test_a_column_of_names_is_whole(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        look_through(written(tmp_path, {"prompt": "a", "who": "one"}, row), "who")


def test_no_file(tmp_path: Path) -> None:
    written(tmp_path, {"prompt": "a"})
    with pytest.raises(DataError, match=r"near it: rows\.jsonl"):
        look_through(tmp_path / "row.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-9])
    with pytest.raises(DataError, match="not whole gzip"):
        look_through(tmp_path / "cut.jsonl.gz")
