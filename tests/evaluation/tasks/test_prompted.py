"""A causal base asked in words: what it is told, and what its answers are read as."""

from __future__ import annotations

import json

import pytest

from peftkit.base.head import Head
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, TaskName, TaskRow
from peftkit.evaluation.tasks.prompted import messages, parse

PLACE = Where("f", 1, 0)
NEWS = Head("sequence", ("Sports", "Business", "Sci/Tech", "not spam", "spam"))
MANY = Head("sequence", ("red", "dark red", "blue"), "multi_label")
STARS = Head("sequence", ("stars",), "regression")
NER = Head("token", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))
POS = Head("token", ("NN", "VB"))
ADA = ("Ada", "Lovelace", "in", "Ada", ".")
SPAN, TEXT = Head("span"), Head("seq2seq")

SOLVED: list[tuple[TaskName, Head, TaskRow]] = [
    ("text_classification", NEWS, TaskRow(PLACE, text="Chip news", target="Sci/Tech")),
    ("text_classification", NEWS, TaskRow(PLACE, text="a", pair="b", target="not spam")),
    ("text_classification", MANY, TaskRow(PLACE, text="wine", target=("red", "dark red"))),
    ("text_classification", MANY, TaskRow(PLACE, text="air", target=())),
    ("regression", STARS, TaskRow(PLACE, text="fine", target=-3.5)),
    ("token_classification", NER, TaskRow(PLACE, words=ADA, target=("B-PER", "I-PER", "O", "B-LOC", "O"))),
    ("token_classification", POS, TaskRow(PLACE, words=("dogs", "bark"), target=("NN", "VB"))),
    ("extractive_qa", SPAN, TaskRow(PLACE, text="Rome is old.", pair="Which is old?", target=(Answer("Rome", 0),))),
    ("extractive_qa", SPAN, TaskRow(PLACE, text="Rome is old.", pair="Which is new?", target=())),
    ("translation", TEXT, TaskRow(PLACE, text="dog", target="Hund")),
    ("summarization", TEXT, TaskRow(PLACE, text="long", target="short")),
]  # fmt: skip


@pytest.mark.parametrize(("task", "head", "row"), SOLVED)
def test_what_a_shot_shows_is_read_back_as_its_target(task: TaskName, head: Head, row: TaskRow) -> None:
    shown = messages(task, head, row, [row])
    assert [turn["role"] for turn in shown] == ["user", "assistant", "user"]
    value = parse(task, head, row, shown[1]["content"]).value
    expected = row.target
    if task == "extractive_qa":
        expected = row.target[0].text if row.target else ""
    assert value == expected
    # The question that is to be answered does not hold its answer, and is asked as the solved one was.
    assert shown[0]["content"].endswith(shown[2]["content"])


@pytest.mark.parametrize(("task", "head", "row"), SOLVED)
def test_the_first_question_says_what_is_asked_and_names_the_labels(task: TaskName, head: Head, row: TaskRow) -> None:
    alone = messages(task, head, row, [])
    assert len(alone) == 1
    names = {label.removeprefix("B-").removeprefix("I-") for label in head.labels} - {"O"}
    assert all(name in alone[0]["content"] for name in names)
    own = messages(task, head, row, [], "Do as I say.")
    assert own[0]["content"].startswith("Do as I say.\n\nText: ")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Sports", "Sports"),
        (" **sports**.", "Sports"),
        ("The label is Business.", "Business"),
        ("sci/tech\nbecause it is about chips and Sports", "Sci/Tech"),
        ("It is not spam", "not spam"),
        ("spam", "spam"),
        ("Sports or Business", ""),
        ("Sportsmanship", ""),
        ("I do not know", ""),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_one_label(answer: str, label: str) -> None:
    assert parse("text_classification", NEWS, TaskRow(PLACE), answer).value == label


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ('["red"]', ("red",)),
        ('Sure: ["Blue", "red", "green"]', ("red", "blue")),
        ("[]", ()),
        ("dark red and blue", ("dark red", "blue")),
        ("[red, blue]", ("red", "blue")),
        ('[["red"]]', ()),
        ("none of them", ()),
    ],
)
def test_several_labels(answer: str, labels: tuple[str, ...]) -> None:
    assert parse("text_classification", MANY, TaskRow(PLACE), answer).value == labels


@pytest.mark.parametrize(
    ("answer", "number"),
    [("4", 4.0), ("About 3.5 stars", 3.5), ("−2", -2.0), ("2,5", 2.5), ("1e2", 100.0), ("five", None), ("", None)],
)
def test_numbers(answer: str, number: float | None) -> None:
    assert parse("regression", STARS, TaskRow(PLACE), answer).value == number


def test_entities_that_do_not_stand_in_the_text_are_left_out() -> None:
    row = TaskRow(PLACE, words=("Ada", "met", "Ada", "Byron"))
    answer = json.dumps(
        [
            {"type": "PER", "text": "ada"},
            {"type": "per", "text": "Ada Byron"},
            {"type": "LOC", "text": "Rome"},
            {"type": "ORG", "text": "met"},
            {"type": "PER"},
            "PER",
            {"type": "LOC", "text": "Byron"},
        ]
    )
    found = parse("token_classification", NER, row, f"```json\n{answer}\n```").value
    assert found == ("B-PER", "O", "B-PER", "I-PER")
    for broken in ("no idea", "[", '[{"type": "PER"', "[" * 5000, "{}", ""):
        assert parse("token_classification", NER, row, broken).value == ("O",) * 4


def test_tags_are_one_for_each_word_whatever_is_answered() -> None:
    row = TaskRow(PLACE, words=("a", "b", "c"))
    assert parse("token_classification", POS, row, '["NN", "XX"]').value == ("NN", "", "")
    assert parse("token_classification", POS, row, '["NN", "VB", "NN", "VB"]').value == ("NN", "VB", "NN")


@pytest.mark.parametrize(
    ("answer", "span"), [("Unanswerable.", ""), ('"Rome"', "Rome"), ("Rome\nIt is old.", "Rome"), ("", "")]
)
def test_answers(answer: str, span: str) -> None:
    assert parse("extractive_qa", SPAN, TaskRow(PLACE), answer).value == span
