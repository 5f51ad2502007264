"""SQuAD's JSON and line-aligned files: nothing is out of place unseen."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.tasks.read import read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import Answer
from peftkit.errors import DataError

Write = Callable[[str, str], str]
QA = TaskSpec(task="extractive_qa")
TRANSLATION = TaskSpec(task="translation")


def squad(*questions: dict[str, Any], context: str = "Ada wrote it in 1843. It ran in 1991.") -> str:
    return json.dumps(
        {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": questions}]}]}
    )


def asked(text: str, start: int, **more: Any) -> dict[str, Any]:
    return {"id": "q1", "question": "When?", "answers": [{"text": text, "answer_start": start}], **more}


def test_questions_become_rows(write: Write) -> None:
    none = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]}
    found = read_rows(QA, write("dev.json", squad(asked("1843", 16, is_impossible=False), none)))
    assert [(row.pair, row.target) for row in found.rows] == [("When?", (Answer("1843", 16),)), ("Why?", ())]
    assert found.rows[1].columns == {"title": "T", "id": "q2"}
    assert "1 without an answer" in found.reason
    assert str(found.rows[1].where) == "dev.json[1]"


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (asked("1991", 16), "(id q1): the answer '1991' is not at character 16 of its context: there stands '1843'"),
        (asked("1991", 16), "; it stands at 32"),
        (asked("it in", 9), "it stands at 10"),
        (asked("It", 99), "it has 37 characters; it stands at 22"),
        (asked("It", -1), "it has 37 characters; it stands at 22"),
        (asked("Ada", -1), "is not at character -1 of its context: it has 37 characters; it stands at 0"),
        (asked("Babbage", 0), "it stands nowhere in the context"),
        (asked("1843", 16, is_impossible=True), "is_impossible, and yet the answer '1843'"),
        ({"id": "q1", "question": "?", "answers": [], "is_impossible": False}, "not is_impossible, and yet no answer"),
        (asked("", 3), "has no text"),
        (asked("1843", "16"), "which is no position"),  # type: ignore[arg-type]
        ({"id": "q1", "answers": []}, "question: there is no value"),
        ({"id": "q1", "question": "?"}, "answers: None is no list of answers"),
    ],
)  # fmt: skip
def test_what_is_out_of_place_is_told(write: Write, question: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(QA, write("dev.json", squad(question)))
    assert told in str(caught.value)
    assert "dev.json[0]" in str(caught.value)


def test_nearest_place_is_named() -> None:
    from peftkit.data.tasks.values import misplaced

    assert "it stands at 8" in (misplaced(Answer("ab", 6), "ab...   ab ab") or "")


def test_every_problem_of_a_file_is_told(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(QA, write("dev.json", squad(asked("x", 0), asked("1843", 16), asked("y", 1))))
    assert "2 problems at 2 places in 3 rows" in str(caught.value)


def test_questions_to_predict_need_no_answers(write: Write) -> None:
    found = read_rows(QA, write("dev.json", squad({"id": "q", "question": "?"})), labelled=False)
    assert found.rows[0].target is None


def test_two_files_are_joined_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "val.en.gz").write_bytes(gzip.compress(b"one\ntwo, three\n"))
    (tmp_path / "val.de").write_bytes("eins\r\nzwei,\u2028drei".encode())
    found = read_rows(TRANSLATION, f"{tmp_path}/val.en.gz+{tmp_path}/val.de")
    assert [(row.text, row.target) for row in found.rows] == [("one", "eins"), ("two, three", "zwei,\u2028drei")]
    assert [str(row.where) for row in found.rows] == ["val.en.gz:1", "val.en.gz:2"]
    assert Path(found.source).name == "val.en.gz+val.de"


def test_a_plus_may_be_part_of_a_name(tmp_path: Path) -> None:
    for name in ("a+b.en", "a+b.de"):
        (tmp_path / name).write_text("x\n")
    assert len(read_rows(TRANSLATION, f"{tmp_path}/a+b.en+{tmp_path}/a+b.de").rows) == 1


def test_unequal_line_counts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"a has 3 lines and .*b has 2"):
        read_rows(TRANSLATION, f"{tmp_path}/a+{tmp_path}/b")


def test_empty_lines_and_missing_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n\n3\n")
    (tmp_path / "b").write_text("1\n2\n \n")
    with pytest.raises(DataError) as caught:
        read_rows(TRANSLATION, f"{tmp_path}/a+{tmp_path}/b")
    assert "a:2: the line is empty" in str(caught.value)
    assert "b:3: the line is empty" in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_rows(TRANSLATION, f"{tmp_path}/a+{tmp_path}/missing")


def test_the_digest_depends_on_both_files(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        (tmp_path / "a").write_text("1\n")
        (tmp_path / "b").write_text(text)
        return read_rows(TRANSLATION, f"{tmp_path}/a+{tmp_path}/b").sha256

    assert digest("x\n") != digest("y\n")
