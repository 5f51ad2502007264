"""The data of a task's run: heads, splits and draws as stated, and what would spoil a run is found."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.readers import Where
from peftkit.data.tasks.audit import TaskAudit, audit_task, inspect_task
from peftkit.data.tasks.heads import head_of
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.strata import set_aside
from peftkit.data.tasks.task import TaskRow
from peftkit.errors import ConfigError, DataError
from peftkit.events import Event, Table

Write = Callable[[str, str], str]
CLASSES = "text_classification"


def table(*rows: tuple[str, Any], label: str = "label") -> str:
    return "".join(json.dumps({"text": text, label: value}) + "\n" for text, value in rows)


def many(count: int, labels: str = "ab") -> list[tuple[str, str]]:
    return [(f"text number {at}", labels[at % len(labels)]) for at in range(count)]


def run(tokenizer: Tokenizer, report: Callable[[Event], None] = lambda event: None, **given: Any) -> TaskAudit:
    head = given.pop("head", None)
    limit = given.pop("limit", None)
    return audit_task(TaskSpec.model_validate({"task": CLASSES, **given}), tokenizer, limit, report, head=head)


def rules(audit: TaskAudit) -> dict[str, int]:
    return {finding.rule: finding.count for finding in audit.findings}


# Heads


def rows_of(*targets: Any) -> list[TaskRow]:
    return [TaskRow(Where("r.csv", at + 2, at), target=target) for at, target in enumerate(targets)]


@pytest.mark.parametrize(
    ("task", "targets", "settings_", "labels"),
    [
        (CLASSES, ["b", "a", "b"], {}, ("a", "b")),
        (CLASSES, ["10", "9", "-1", "1.5"], {}, ("-1", "1.5", "9", "10")),
        (CLASSES, ["10", "9", "x"], {}, ("10", "9", "x")),
        (CLASSES, ["nan", "1", "2"], {}, ("1", "2", "nan")),
        (CLASSES, [("b", "a"), (), ("a",)], {"multi_label": True}, ("a", "b")),
        (CLASSES, [("a",), ()], {"multi_label": True}, ("a",)),
        ("regression", [1.0, 2.0], {"label": "stars"}, ("stars",)),
        ("token_classification", [("O", "B-z"), ("B-a", "I-a")], {}, ("O", "B-a", "I-a", "B-z", "I-z")),
        ("token_classification", [("VERB", "DET")], {}, ("DET", "VERB")),
        ("extractive_qa", [(), ()], {}, ("no answer",)),
        ("translation", ["x"], {}, ()),
    ],
)
def test_labels_are_in_order(task: str, targets: list[Any], settings_: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert head_of(TaskSpec.model_validate({"task": task, **settings_}), rows_of(*targets)).labels == labels


@pytest.mark.parametrize(
    ("task", "targets", "settings_"),
    [
        (CLASSES, ["a", "a"], {}),
        (CLASSES, [("a",), ("a",)], {"multi_label": True}),
        (CLASSES, [(), ()], {"multi_label": True}),
        ("regression", [1.0, 1.0], {}),
        ("token_classification", [("O", "O")], {}),
    ],
)
def test_one_class_is_refused(task: str, targets: list[Any], settings_: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"r\.csv: all \d rows have the same"):
        head_of(TaskSpec.model_validate({"task": task, **settings_}), rows_of(*targets))


# Splits


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.sampled_from("abc")), min_size=2, max_size=40),
    st.floats(0.05, 0.6),
    st.integers(0, 5),
)
def test_what_is_set_aside(rows: list[tuple[int, str]], share: float, seed: int) -> None:
    keys, strata = [str(key) for key, _ in rows], [label for _, label in rows]
    groups: dict[str, set[str]] = {}
    for key in keys:
        groups.setdefault(min(s for k, s in zip(keys, strata, strict=True) if k == key), set()).add(key)
    if all(len(names) < 2 for names in groups.values()):
        with pytest.raises(DataError, match="none can be set aside"):
            set_aside(keys, strata, share, seed)
        return
    held = set_aside(keys, strata, share, seed)
    assert 0 < len(held) < len(rows)
    for key in set(keys):  # equal contents stay together
        assert len({at in held for at, one in enumerate(keys) if one == key}) == 1
    for names in groups.values():  # something of every stratum is trained on
        assert any(key in names and at not in held for at, key in enumerate(keys))
    turned = set_aside(keys[::-1], strata[::-1], share, seed)
    assert {len(rows) - 1 - at for at in turned} == held


def test_every_label_gives_its_share() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    held = set_aside([str(at) for at in range(100)], labels, 0.1, 0)
    assert Counter(labels[at] for at in held) == {"a": 6, "b": 3, "c": 1}


def test_texts_to_write_are_no_labels(write: Write, causal: Tokenizer) -> None:
    """Were they, texts that stand once could not be set aside, and those that stand twice alone would be."""
    lines = [{"source": f"one {at} cat", "target": f"eine {at} Katze" if at % 5 else "Katzen"} for at in range(40)]
    path = write("r.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = run(causal, task="translation", train=path, held_out_share=0.25)
    targets = [row.target for row in found.held_out.rows]
    assert len(targets) == 10
    assert len({*targets} - {"Katzen"}) >= 6


def test_without_a_held_out_file_rows_are_set_aside(write: Write, causal: Tokenizer) -> None:
    path = write("r.jsonl", table(*many(40), *many(40)))
    found = run(causal, train=path, held_out_share=0.25)
    assert (len(found.train.rows), len(found.held_out.rows)) == (60, 20)
    assert {row.text for row in found.train.rows}.isdisjoint(row.text for row in found.held_out.rows)
    assert found.labels == {"a": (30, 10), "b": (30, 10)}
    other = run(causal, train=path, held_out_share=0.25, seed=1)
    assert {row.text for row in other.held_out.rows} != {row.text for row in found.held_out.rows}


def test_questions_about_one_context_stay_together(write: Write, causal: Tokenizer) -> None:
    paragraphs = [
        {
            "context": f"context {at}",
            "qas": [{"question": f"q{n}", "answers": [{"text": str(at), "answer_start": 8}]} for n in range(3)],
        }
        for at in range(8)
    ]
    path = write("s.json", json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    found = run(causal, task="extractive_qa", train=path, held_out_share=0.25)
    assert (len(found.train.rows), len(found.held_out.rows)) == (18, 6)
    assert {row.text for row in found.train.rows}.isdisjoint(row.text for row in found.held_out.rows)


# Draws


def test_draws_are_nested_and_leave_the_held_out_rows_alone(write: Write, causal: Tokenizer) -> None:
    path, held = write("r.jsonl", table(*many(60))), write("h.jsonl", table(*[(f"held {at}", "a") for at in range(20)]))

    def texts(count: int, draw: int) -> tuple[set[str], set[str]]:
        found = run(causal, train=path, held_out=held, max_train_rows=count, max_held_out_rows=5, draw=draw)
        return {row.text for row in found.train.rows}, {row.text for row in found.held_out.rows}

    few, measured = texts(8, 0)
    more, again = texts(16, 0)
    other, same = texts(8, 1)
    assert (len(few), len(more), len(measured)) == (8, 16, 5)
    assert few < more
    assert few != other
    assert measured == again == same


def test_a_balanced_draw_has_as_many_of_each(write: Write, causal: Tokenizer) -> None:
    rows = [(f"text {at}", "a" if at % 5 else "b" if at % 2 else "c") for at in range(200)]
    path = write("r.jsonl", table(*rows))
    held = write("h.jsonl", table(("x", "a"), ("y", "b"), ("z", "c")))
    found = run(causal, train=path, held_out=held, max_train_rows=25, balance=True)
    assert Counter(row.target for row in found.train.rows) == {"a": 8, "b": 8, "c": 8}
    with pytest.raises(DataError, match="'b' has 20, 'c' has 20"):
        run(causal, train=path, held_out=held, max_train_rows=63, balance=True)
    with pytest.raises(DataError, match="3 labels"):
        run(causal, train=path, held_out=held, max_train_rows=2, balance=True)


def test_a_draw_that_loses_a_label_keeps_its_output(write: Write, causal: Tokenizer) -> None:
    path = write("r.jsonl", table(*many(50, "aaaaaaaaab")))
    held = write("h.jsonl", table(("x", "a"), ("y", "b")))
    found = run(causal, train=path, held_out=held, max_train_rows=1)
    assert found.head.labels == ("a", "b")
    assert {"one_answer", "label_unseen"} <= set(rules(found))


def test_mixture_and_augment_are_part_of_the_data(write: Write, causal: Tokenizer) -> None:
    first = write("a.jsonl", table(*[(f"first file, row number {at}", "ab"[at % 2]) for at in range(10)]))
    second = write("b.jsonl", table(*[(f"second file, row number {at}", "ab"[at % 2]) for at in range(10)]))
    held = write("h.jsonl", table(("x", "a"), ("y", "b")))
    found = run(causal, mixture={first: 3, second: 1}, held_out=held)
    assert Counter(row.where.file for row in found.train.rows) == {"a.jsonl": 15, "b.jsonl": 5}
    assert "duplicate" not in rules(found)  # a row of a mixture may stand there twice, and is written once
    assert found.train.record()["source"] == "a.jsonl (3) + b.jsonl (1)"
    found = run(causal, train=first, held_out=held, augment={"times": 2})
    assert len(found.train.rows) == 30
    apart = run(causal, mixture={first: 1, second: 1}, held_out_share=0.2)
    assert Counter(row.where.file for row in apart.held_out.rows) == {"a.jsonl": 2, "b.jsonl": 2}


# What is found


def test_a_label_that_training_lacks_is_refused(write: Write, causal: Tokenizer) -> None:
    path, held = (
        write("r.jsonl", table(("x", "pos"), ("y", "neg"))),
        write("h.jsonl", table(("u", "poss"), ("v", "other"))),
    )
    with pytest.raises(DataError) as caught:
        run(causal, train=path, held_out=held)
    assert "2 problems at 2 places" in str(caught.value)
    assert "h.jsonl:1: the label 'poss' is not in the training rows; did you mean 'pos'?" in str(caught.value)


def test_problems_of_both_files_are_told_at_once(write: Write, causal: Tokenizer) -> None:
    path, held = write("r.jsonl", table(("", "a"), ("y", "b"))), write("h.jsonl", table(("u", "a"), ("v", None)))
    with pytest.raises(DataError) as caught:
        run(causal, train=path, held_out=held)
    assert "r.jsonl:1: text: it is empty" in str(caught.value)
    assert "h.jsonl:2: label: there is no value" in str(caught.value)


def test_leaks_stop_a_run_from_a_share_on(write: Write, causal: Tokenizer) -> None:
    path = write("r.jsonl", table(*many(100)))
    held = write("h.jsonl", table(*[(f"held {at}", "a") for at in range(9)], ("Text  number 0", "a")))
    with pytest.raises(DataError, match="leak") as caught:
        run(causal, train=path, held_out=held)
    assert "h.jsonl:10" in str(caught.value)
    assert "r.jsonl:1" in str(caught.value)
    few = write(
        "f.jsonl", table(*[(f"held {at}", "a") for at in range(30)], ("text number 0", "a"), ("text number 1", "a"))
    )
    found = run(causal, train=path, held_out=few)
    assert rules(found)["leak"] == 1
    assert rules(found)["leak_prompt"] == 1  # the same text with another label


def test_duplicates_conflicts_and_labels_are_found(write: Write, causal: Tokenizer) -> None:
    rows = [*many(96, "a"), ("text number 0", "a"), ("text number 1", "b"), ("Text number 2 ", "A"), ("other", "c")]
    found = run(causal, train=write("r.jsonl", table(*rows)), held_out=write("h.jsonl", table(("held", "a"))))
    assert rules(found) == {"duplicate": 1, "conflict": 2, "imbalance": 97, "label_variant": 1, "label_rare": 2}
    seen = {finding.rule: finding.examples[0].where for finding in found.findings if finding.examples}
    assert (seen["duplicate"], seen["conflict"], seen["label_variant"]) == ("r.jsonl:97", "r.jsonl:98", "r.jsonl:99")


def test_long_rows_stop_a_run_with_their_places(write: Write, causal: Tokenizer) -> None:
    path = write("r.jsonl", table(("x" * 50, "a"), ("y", "b")))
    held = write("h.jsonl", table(("u", "a")))
    with pytest.raises(DataError, match=r"r\.jsonl:1: 50 tokens"):
        run(causal, train=path, held_out=held, limit=20)
    found = run(causal, train=path, held_out=held, limit=20, too_long="truncate")
    assert (rules(found)["cut"], found.train.truncated) == (1, ("r.jsonl:1",))
    both = write("l.jsonl", table(("x" * 50, "a"), ("y" * 50, "b")))
    with pytest.raises(DataError, match="nothing_to_learn"):
        run(causal, train=both, held_out=held, limit=20, too_long="drop")


def test_what_is_to_be_written_is_looked_at_too(write: Write, causal: Tokenizer) -> None:
    path = write("r.csv", "source,target\none,eins\ntwo,schreib an ada@lovelace.org\n")
    found = run(causal, task="translation", train=path, held_out=write("h.csv", "source,target\nthree,drei\n"))
    assert rules(found) == {"email": 1}
    assert found.head == Head("seq2seq")
    assert causal.decode([int(at) for at in found.train.examples[0].target]) == "eins"


def test_words_without_tokens_are_found(write: Write, encoder: Tokenizer) -> None:
    path = write("r.conll", "a B-x\n\u200d O\n\nb O\n")
    found = run(encoder, task="token_classification", train=path, held_out=write("h.conll", "c O\n"))
    assert rules(found)["word_unseen"] == 1
    assert "\\u200d" in found.findings[-1].examples[0].excerpt


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((1, 3, 5), False),
        ((-9, 9), False),
        ((100, 104), True),
        ((1e6, 2e6), True),
        ((0.01, 0.02), True),
        ((1_234_564, 1_234_570), True),
        ((-1e308, 1e308, 5e307), True),
    ],
)
def test_numbers_far_from_where_a_head_begins_are_told(
    write: Write, encoder: Tokenizer, numbers: tuple[float, ...], told: bool
) -> None:
    path = write("r.jsonl", table(*((f"t{at}", number) for at, number in enumerate(numbers))))
    held = write("h.jsonl", table(("u", numbers[0])))
    found = run(encoder, task="regression", train=path, held_out=held)
    assert ("far_numbers" in rules(found)) == told
    assert "far_numbers" not in rules(run(encoder, task="regression", train=path, held_out=held, head=found.head))
    if not told:
        return
    center, deviation = re.findall(r"\(number - (\S+)\) / (\S+),", found.findings[-1].mend or "")[0]
    scaled = (np.array(numbers) - float(center)) / float(deviation)
    assert abs(scaled.mean()) < 0.01
    assert scaled.std() == pytest.approx(1, rel=0.01)


def test_numbers_that_differ_by_next_to_nothing_have_no_formula(write: Write, encoder: Tokenizer) -> None:
    path, held = write("r.jsonl", table(("x", 5e-324), ("y", 0.0))), write("h.jsonl", table(("u", 0.0)))
    found = run(encoder, task="regression", train=path, held_out=held)
    assert rules(found) == {"far_numbers": 2}
    assert "numbers around 0" in (found.findings[0].mend or "")


def test_a_continued_head_takes_its_own_labels_only(write: Write, causal: Tokenizer) -> None:
    path, held = write("r.jsonl", table(("x", "a"), ("y", "b"))), write("h.jsonl", table(("u", "a")))
    head = Head("sequence", ("a", "b", "c"))
    found = run(causal, train=path, held_out=held, head=head)
    assert found.head == head
    assert [one.target for one in found.train.examples] == [(0,), (1,)]
    with pytest.raises(DataError, match="'b' is not in the adapter's head"):
        run(causal, train=path, held_out=held, head=Head("sequence", ("a", "c")))
    with pytest.raises(DataError, match="token head"):
        run(causal, train=path, held_out=held, head=Head("token", ("a", "b")))


def test_settings_that_do_not_go_together_are_told_at_once(causal: Tokenizer) -> None:
    with pytest.raises(ConfigError) as caught:
        run(causal, task="regression", multi_label=True, balance=True)
    assert len(caught.value.problems) == 4


def test_counts_and_record(write: Write, causal: Tokenizer) -> None:
    told: list[Event] = []
    path, held = write("r.jsonl", table(("xy", "a"), ("y", "b"))), write("h.jsonl", table(("u", "a")))
    found = run(causal, told.append, train=path, held_out=held, license="cc0-1.0")
    tables = {event.title: event.rows for event in told if isinstance(event, Table)}
    assert tables["data"] == (("train", 2, 2, 3, 2, 2, 0, 0), ("held-out", 1, 1, 1, 1, 1, 0, 0))
    assert tables["labels"] == (("a", 1, 1), ("b", 1, 0))
    record = json.loads(json.dumps(found.record()))
    assert record["head"] == {"kind": "sequence", "labels": ["a", "b"], "problem": "single_label"}
    assert [part["rows"] for part in record["parts"]] == [2, 1]
    assert record["tokens"] == {"edges": [0, 1, 2], "counts": [2, 1]}
    assert record["parts"][0]["license"] == "cc0-1.0"


def test_numbers_and_questions_have_tables_of_their_own(write: Write, causal: Tokenizer) -> None:
    told: list[Event] = []
    path = write("r.jsonl", table(("x", 1), ("y", 4), label="score"))
    held = write("h.jsonl", table(("u", 2), label="score"))
    found = run(causal, told.append, task="regression", train=path, held_out=held)
    assert found.head.labels == ("score",)
    tables = {event.title: event.rows for event in told if isinstance(event, Table)}
    assert tables["numbers"] == (("train", 1.0, 2.5, 4.0), ("held-out", 2.0, 2.0, 2.0))


def test_inspect_returns_what_audit_refuses(write: Write, causal: Tokenizer) -> None:
    path = write("r.jsonl", table(*many(10)))
    found = inspect_task(TaskSpec(task="text_classification", train=path, held_out=path), causal, None)
    assert [finding.rule for finding in found.errors] == ["leak"]
    assert found.overlap == 1.0
