"""Every form of a preference is read as the same conversations; what is none is refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.preference.rows import load_preferences
from peftkit.errors import DataError

ASKED = [{"role": "user", "content": "2 + 2?"}]
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
FORMS: dict[str, dict[str, Any]] = {
    "prompt pairs": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "prompt pairs, as messages": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "prompt pairs, half as messages": {"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
    "alpaca pairs": {"instruction": "2 + 2?", "input": "", "output": "not read", "chosen": "4", "rejected": "5"},
    "sharegpt pairs": {
        "conversations": [{"from": "human", "value": "2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "messages pairs": {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
    "whole conversations pairs": {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
    "whole conversations pairs, as ultrafeedback": {
        "prompt": "2 + 2?", "messages": [*ASKED, GOOD], "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD],
    },
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: dict[str, Any]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_conversations(written: Callable[..., Path], form: str) -> None:
    found = load_preferences(written({**FORMS[form], "id": 7}), "pairs")
    assert found.format == form.partition(",")[0]
    assert not found.problems
    (row,) = found.rows
    assert row.rejected is not None
    assert row.chosen.messages == (*ASKED, GOOD)
    assert row.rejected.messages == (*ASKED, BAD)
    assert row.prompt == tuple(ASKED)
    assert row.chosen.columns == {"id": 7}
    assert str(row.where) == "rows.jsonl:1"


@pytest.mark.parametrize("form", FORMS)
def test_pairs_give_a_wanted_and_an_unwanted_answer(written: Callable[..., Path], form: str) -> None:
    found = load_preferences(written(FORMS[form]), "labelled")
    assert [(row.chosen.messages[-1], row.desirable) for row in found.rows] == [(GOOD, True), (BAD, False)]
    assert "each pair gives a wanted and an unwanted answer" in found.reason


@pytest.mark.parametrize("label", [True, "true", "True", 1, False, "false", 0])
def test_labels(written: Callable[..., Path], label: Any) -> None:
    (row,) = load_preferences(written({"prompt": "2 + 2?", "completion": "4", "label": label}), "labelled").rows
    assert row.desirable is (label in (True, "true", "True"))
    assert row.chosen.messages == (*ASKED, GOOD)


OK = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({**OK, "rejected": "2"}, "rejected: found the same answer as 'chosen', expected two different answers"),
        ({**OK, "rejected": ""}, "rejected: found an empty text ('')"),
        ({**OK, "chosen": None}, "chosen[0].content: found null, expected a text"),
        ({**OK, "prompt": " "}, "prompt: found an empty text"),
    ],
)
def test_a_bad_row_is_told_by_line_and_column(written: Callable[..., Path], record: Any, told: str) -> None:
    found = load_preferences(written(OK, record), "pairs")
    assert len(found.rows) == 1
    assert len(found.problems) == 1  # a prompt that both conversations share is told once
    assert str(found.problems[0]).startswith(f"rows.jsonl:2: {told}")


def test_other_prompts_are_no_preference(written: Callable[..., Path]) -> None:
    other = [{"role": "user", "content": "3 + 3?"}, BAD]
    whole = {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}
    found = load_preferences(written(whole, {**whole, "rejected": other}), "pairs")
    assert [str(problem) for problem in found.problems] == [
        "rows.jsonl:2: rejected: found another prompt than that of 'chosen', expected two answers to one prompt"
    ]
    wrong = load_preferences(written({**whole, "prompt": "2 + 2?"}, {**whole, "prompt": "what?"}), "pairs").problems
    assert [str(problem) for problem in wrong] == [
        "rows.jsonl:2: prompt: found 'what?', expected what the user says in 'chosen'"
    ]


def test_an_answer_in_a_conversation_is_named_by_its_column(written: Callable[..., Path]) -> None:
    record = FORMS["sharegpt pairs"]
    found = load_preferences(written(record, {**record, "chosen": {"from": "gpt", "value": " "}}), "pairs")
    assert [problem.field for problem in found.problems] == ["chosen.value"]


@pytest.mark.parametrize(
    ("records", "kind", "told"),
    [
        ([{"prompt": "a", "completion": "b"}], "pairs", "hold no preference, first rows.jsonl:1 with the columns"),
        ([OK, {"prompt": "a", "chosen": "b"}], "pairs", "1 of 2 rows hold no preference, first rows.jsonl:2"),
        ([{"prompt": "a", "completion": "b", "label": True}], "pairs", "every row has 'label'"),
        ([{"prompt": "a", "completion": "b", "label": "maybe"}], "labelled", "label: found 'maybe', expected true or"),
        ([{**OK, "rejected": "2"}], "pairs", "none of 1 rows can be used"),
        ([{**OK, "rejected": ""}], "pairs", "rejected: found an empty text"),
        ([{"text": "plain", "label": True}], "labelled", "found a plain text"),
    ],
)
def test_what_is_no_preference_is_refused(
    written: Callable[..., Path], records: list[dict[str, Any]], kind: Any, told: str
) -> None:
    with pytest.raises(DataError) as error:
        load_preferences(written(*records), kind)
    assert told in error.value.fact


def test_real_files(test_data: Path) -> None:
    """LLaMA-Factory's demo is whole; in the book's, six answers are the same on both sides."""
    demo = load_preferences(test_data / "llamafactory_demo" / "dpo_en_demo.json", "pairs")
    assert (len(demo.rows), len(demo.problems)) == (300, 0)
    book = load_preferences(test_data / "rasbt_instruction" / "instruction-data-with-preference.json", "pairs")
    assert (len(book.rows), len(book.problems)) == (1094, 6)
    assert {problem.found for problem in book.problems} == {"the same answer as 'chosen'"}
