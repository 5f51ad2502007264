"""Tables become rows whole, and every reason why one cannot is told at once with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.readers import Where
from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import Answer
from peftkit.errors import DataError

Write = Callable[[str, str], str]


def read(source: str, task: str, *, labelled: bool = True, **settings: Any) -> TaskDataset:
    return read_rows(TaskSpec.model_validate({"task": task, **settings}), source, labelled=labelled)


def refused(source: str, task: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, task, **settings)
    return str(caught.value)


def jsonl(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [("text,label", 0, 1), ("class,sentence", 1, 0), ("id,Review,Sentiment", 1, 2), ("category,tweet,id", 1, 0)],
)
def test_columns_are_found_by_their_usual_names(write: Write, header: str, text: int, label: int) -> None:
    cells = [["a text", "x"], ["b text", "y"]]
    names = header.split(",")
    rows = [
        [cells[at][0] if i == text else cells[at][1] if i == label else f"n{at}" for i in range(len(names))]
        for at in (0, 1)
    ]
    found = read(write("rows.csv", "\n".join([header, *(",".join(row) for row in rows)])), "text_classification")
    assert [(row.text, row.target) for row in found.rows] == [("a text", "x"), ("b text", "y")]
    assert repr(names[text]) in found.reason
    assert repr(names[label]) in found.reason
    assert [row.where for row in found.rows] == [Where("rows.csv", 2, 0), Where("rows.csv", 3, 1)]
    assert found.label == names[label]


def test_other_columns_stay_with_the_row(write: Write) -> None:
    found = read(write("r.jsonl", jsonl({"text": "a", "label": 1, "region": "north"})), "text_classification")
    assert found.rows[0].columns == {"region": "north"}
    assert "'region'" in found.reason


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    import pyarrow
    from pyarrow import parquet

    records = [{"text": "one, two", "label": "a"}, {"text": "drei", "label": "b"}]
    path, kind = tmp_path / f"rows.{ending}", ending.removesuffix(".gz")
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        mark = "\t" if kind == "tsv" else ","
        table = f"text{mark}label\n" + "".join(f'"{r["text"]}"{mark}{r["label"]}\n' for r in records)
        data = {"json": json.dumps(records), "jsonl": jsonl(*records)}.get(kind, table).encode()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    found = read(str(path), "text_classification")
    assert [(row.text, row.target) for row in found.rows] == [("one, two", "a"), ("drei", "b")]


def test_a_file_without_a_header_takes_its_columns_from_the_settings(write: Write) -> None:
    path = write("news.csv", '"3","A title","Some text"\n"4","B","More, of it"\n')
    columns = ["label", "title", "description"]
    found = read(path, "text_classification", columns=columns, text="title", pair="description")
    assert [(row.text, row.pair, row.target) for row in found.rows] == [
        ("A title", "Some text", "3"),
        ("B", "More, of it", "4"),
    ]
    assert [row.where.line for row in found.rows] == [1, 2]
    told = refused(path, "text_classification")
    assert "'3', 'A title', 'Some text'" in told
    assert "data.columns=[" in told


def test_a_first_row_of_equal_cells_is_a_row_where_columns_are_given(write: Write) -> None:
    found = read(write("n.tsv", "1\t1\n2\t2\n"), "text_classification", columns=["text", "label"])
    assert [(row.text, row.target) for row in found.rows] == [("1", "1"), ("2", "2")]


def test_columns_that_do_not_fit_are_refused(write: Write) -> None:
    path = write("n.csv", "a,b\nc,d,e\n")
    assert "n.csv:2: 3 cells" in refused(path, "text_classification", columns=["text", "label"])
    assert "twice" in refused(path, "text_classification", columns=["text", "text"])
    other = write("n.jsonl", jsonl({"text": "a", "label": "b"}))
    assert "leave data.columns out" in refused(other, "text_classification", columns=["text", "label"])


def test_an_ambiguous_and_a_missing_column_are_both_told(write: Write) -> None:
    told = refused(write("r.csv", "text,sentence,lable\na,b,c\n"), "text_classification")
    assert "'text' and 'sentence' are each named like it" in told
    assert "did you mean 'lable'?" in told
    assert "data.text=COLUMN" in told
    told = refused(write("r.csv", "text,label\na,b\n"), "text_classification", text="texts")
    assert "data.text='texts' is no column; did you mean 'text'?" in told


def test_settings_choose_between_columns(write: Write) -> None:
    path = write("r.csv", "text,sentence,y,label\na,b,c,d\n")
    found = read(path, "text_classification", text="sentence", label="y")
    assert (found.rows[0].text, found.rows[0].target) == ("b", "c")
    assert found.rows[0].columns == {"text": "a", "label": "d"}
    assert "would be two things" in refused(path, "text_classification", text="label", label="label")


def test_all_problems_are_listed_and_counted(write: Write) -> None:
    rows = [{"text": "", "label": "a"}, {"text": "b"}, {"text": None, "label": ["x"]}, {"text": "fine", "label": 1}]
    told = refused(write("r.jsonl", jsonl(*rows)), "text_classification")
    assert "4 problems at 3 places in 4 rows" in told
    assert "r.jsonl:1: text: it is empty" in told
    assert "r.jsonl:2: the column 'label' is missing" in told
    assert "r.jsonl:3: text: there is no value" in told
    assert "r.jsonl:3: label: ['x'] is no text" in told
    many = refused(write("m.jsonl", jsonl(*[{"text": " ", "label": "a"}] * 31)), "text_classification")
    assert many.count("it is empty") == 20
    assert "and 11 more" in many


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("nan", "'nan' is not a finite number"),
        ("-inf", "'-inf' is not a finite number"),
        ("1,5", "'1,5' is no number; decimals follow a point"),
        ("four", "'four' is no number"),
        (True, "True is no number"),
        (None, "None is no number"),
        ("", "'' is no number"),
        (10**400, f"1{'0' * 59}… is no number"),
    ],
)
def test_a_number_that_is_none_is_refused(write: Write, value: Any, told: str) -> None:
    path = write("r.jsonl", jsonl({"text": "a", "score": 1}, {"text": "b", "score": value}))
    assert f"r.jsonl:2: score: {told}" in refused(path, "regression")


def test_numbers_are_read_from_texts_and_numbers(write: Write) -> None:
    records = [{"text": "a", "score": value} for value in (1, 2.5, "-3", "4e-1")]
    assert [row.target for row in read(write("r.jsonl", jsonl(*records)), "regression").rows] == [1.0, 2.5, -3.0, 0.4]


def test_labels_of_several_kinds_become_texts(write: Write) -> None:
    records = [{"text": "a", "label": value} for value in (3, True, " kept ")]
    found = read(write("r.jsonl", jsonl(*records)), "text_classification")
    assert [row.target for row in found.rows] == ["3", "true", " kept "]


def test_several_labels_are_a_list_or_one_separated_text(write: Write) -> None:
    values = [["a", "b"], "a; b", "", [], '["c"]', "b"]
    path = write("r.jsonl", jsonl(*[{"text": "t", "labels": value} for value in values]))
    found = read(path, "text_classification", multi_label=True)
    assert [row.target for row in found.rows] == [("a", "b"), ("a", "b"), (), (), ("c",), ("b",)]
    twice = write("t.jsonl", jsonl({"text": "t", "labels": "a;a"}, {"text": "t", "labels": "a;;b"}))
    told = refused(twice, "text_classification", multi_label=True)
    assert "t.jsonl:1: labels: 'a;a' names a label twice" in told
    assert "t.jsonl:2: labels: it is empty" in told


def test_words_and_tags_stand_in_lists_or_in_one_text(write: Write) -> None:
    records = [{"tokens": ["New York", "is"], "ner_tags": ["B-x", "O"]}, {"tokens": "a b", "ner_tags": "O O"}]
    found = read(write("r.jsonl", jsonl(*records)), "token_classification")
    assert [(row.words, row.target) for row in found.rows] == [
        (("New York", "is"), ("B-x", "O")),
        (("a", "b"), ("O", "O")),
    ]


def test_words_and_tags_must_be_as_many(write: Write) -> None:
    records = [
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": ["a"], "tags": [3]},
        {"tokens": ["a", " "], "tags": ["O", "O"]},
    ]
    told = refused(write("r.jsonl", jsonl(*records)), "token_classification")
    assert "r.jsonl:1: 2 words and 1 tags" in told
    assert "r.jsonl:2: tags: the tag 3 is a number" in told
    assert "r.jsonl:3: tokens: word 2 is ' ', which is no word" in told


def test_answers_in_tables_are_checked_against_their_context(write: Write) -> None:
    good = {"context": "ab cd", "question": "q", "answers": {"text": ["cd"], "answer_start": [3]}}
    none = {"context": "ab cd", "question": "q", "answers": {"text": [], "answer_start": []}}
    found = read(write("r.jsonl", jsonl(good, none)), "extractive_qa")
    assert [row.target for row in found.rows] == [(Answer("cd", 3),), ()]
    assert (found.rows[0].text, found.rows[0].pair) == ("ab cd", "q")
    bad = {"context": "cd ab cd ab", "question": "q", "answers": [{"text": "cd", "answer_start": 4}]}
    told = refused(write("b.jsonl", jsonl(bad)), "extractive_qa")
    assert "b.jsonl:1: the answer 'cd' is not at character 4 of its context: there stands 'b '; it stands at 6" in told


def test_two_columns_named_after_languages_are_translated_in_their_order(write: Write) -> None:
    found = read(write("r.csv", "de,en\nHallo,Hello\n"), "translation")
    assert (found.rows[0].text, found.rows[0].target) == ("Hallo", "Hello")
    nested = write("n.jsonl", jsonl({"id": 7, "translation": {"en": "Hello", "fr": "Salut"}}))
    found = read(nested, "translation")
    assert (found.rows[0].text, found.rows[0].target, found.rows[0].columns) == ("Hello", "Salut", {"id": 7})
    swapped = read(nested, "translation", text="fr", label="en")
    assert (swapped.rows[0].text, swapped.rows[0].target) == ("Salut", "Hello")


def test_summaries_are_found(write: Write) -> None:
    found = read(write("r.jsonl", jsonl({"article": "long", "highlights": "short", "id": 1})), "summarization")
    assert (found.rows[0].text, found.rows[0].target) == ("long", "short")


@pytest.mark.parametrize("task", ["text_classification", "regression", "translation", "token_classification"])
def test_rows_to_predict_need_no_target_and_have_none(write: Write, task: str) -> None:
    column = {"translation": "source", "token_classification": "tokens"}.get(task, "text")
    path = write("r.jsonl", jsonl({column: "a b"}, {column: "c"}))
    assert [row.target for row in read(path, task, labelled=False).rows] == [None, None]
    assert "column" in refused(path, task)
    wrong = write("w.jsonl", jsonl({column: "a b", "label": None}))
    assert read(wrong, task, labelled=False).rows[0].columns == {"label": None}
