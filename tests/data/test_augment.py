"""Copies keep what a label hangs on: negations, numbers and marks in texts, BIO tags, answer spans."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data import edits
from peftkit.data.augment import AugmentSpec, augment, edits_for
from peftkit.data.edits import NEIGHBOURS, Words, case, delete, mentions, swap, typo
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, TaskRow
from peftkit.errors import ConfigError

KEPT = ["not", "never", "isn't", "dont", "n't", "nicht", "4", "3rd", "@bob", "#fun", "http://a.b/c", "<b>", ":-)", "…"]
PLAIN = ["good", "movie", "the", "a", "plot", "Acting", "dull", "very", "überlang", "ending,", "(slow)", "x", "ßig"]
chunks = st.lists(st.sampled_from(KEPT + PLAIN + ["."]), min_size=1, max_size=14)
spaces = st.sampled_from([" ", "  ", "\n"])
texts = st.builds(lambda words, space: space.join(words), chunks, spaces)
TEXT_EDITS = {"delete": delete, "swap": swap, "typo": typo, "case": case}


def where(index: int) -> Where:
    return Where("rows.csv", index + 2, index)


def labelled(*given_rows: tuple[str, Any]) -> list[TaskRow]:
    return [TaskRow(where(at), {"source": at}, text=text, target=label) for at, (text, label) in enumerate(given_rows)]


def words_of(*of: str) -> Words:
    """As if every word stood in rows of two labels."""
    return Words.of((text, label) for text in of for label in "ab")


@settings(deadline=None)
@given(texts, st.sampled_from(sorted(TEXT_EDITS)), st.floats(0.05, 0.5), st.integers(0, 20))
def test_no_edit_touches_negations_numbers_and_marks_nor_empties_a_text(
    text: str, edit: str, rate: float, seed: int
) -> None:
    edited = TEXT_EDITS[edit](text, rate, random.Random(seed), words_of(text))
    assert Counter(word for word in edited.split() if word in KEPT) == Counter(w for w in text.split() if w in KEPT)
    assert len(edited.split()) >= (len(text.split()) + 1) // 2
    if edit != "delete":
        assert list(edits._parts(edited)[1::2]) == edits._parts(text)[1::2]
    if edit in ("delete", "swap"):
        assert not Counter(edited.split()) - Counter(text.split())


@settings(deadline=None)
@given(chunks, st.sampled_from(sorted(TEXT_EDITS)), st.integers(0, 20))
def test_what_a_negation_holds_for_stays_behind_it(before: list[str], edit: str, seed: int) -> None:
    scope = ["not", "very", "good", "movie", ","]
    text = " ".join([*before, *scope, "the", "plot", "Acting", "dull"])
    edited = TEXT_EDITS[edit](text, 0.5, random.Random(seed), words_of(text))
    assert " ".join(scope) in edited


@pytest.mark.parametrize(
    ("edit", "text", "seed_of", "found"),
    [
        (swap, "big dog", range(1), {"dog big"}),
        (swap, "one two three", range(20), {"two one three", "one three two"}),
        (delete, "big dog", range(20), {"big", "dog"}),
        (delete, "dog", range(3), {"dog"}),
        (delete, "a  b\tc d", range(40), {"b\tc d", "a\tc d", "a  b d", "a  b\tc"}),
        (case, "Big", range(1), {"big"}),
        (typo, "cat", range(3), {"cat"}),
    ],
)
def test_edits_worked_by_hand(edit: Any, text: str, seed_of: Any, found: set[str]) -> None:
    assert {edit(text, 0.1, random.Random(seed), words_of(text)) for seed in seed_of} == found


def test_no_word_is_exchanged_twice() -> None:
    found = {swap("one two three four", 0.5, random.Random(seed), words_of()) for seed in range(60)}
    assert found == {"two one four three", "one three two four"}


def test_a_typo_hits_a_neighbouring_key_inside_a_word_and_makes_no_known_word() -> None:
    found = {typo("Great,", 0.1, random.Random(seed), words_of("great", "grest")) for seed in range(300)}
    inner = {"Great,"[:at] + other + "Great,"[at + 1 :] for at in (1, 2, 3) for other in NEIGHBOURS["Great"[at]]}
    assert found == (inner - {"Grest,"}) | {"Great,"}  # where the draw would make the known word, nothing is changed
    assert all(one in NEIGHBOURS[other] for one, beside in NEIGHBOURS.items() for other in beside)
    assert NEIGHBOURS["s"] == "adewxz"


def test_only_words_that_stand_in_rows_of_several_labels_are_deleted() -> None:
    words = Words.of([("the movie is great", "1"), ("the movie is dull", "0")])
    assert words.shared == {"the", "movie", "is"}
    found = {delete("the movie is great", 0.25, random.Random(seed), words) for seed in range(30)}
    assert found == {"movie is great", "the is great", "the movie great"}


rows_of_text = st.lists(st.tuples(texts, st.sampled_from(["0", "1"])), min_size=1, max_size=8)


@settings(deadline=None)
@given(rows_of_text, st.integers(1, 4), st.integers(0, 5))
def test_copies_are_new_keep_label_place_and_columns_and_are_counted(
    given_rows: list[tuple[str, str]], times: int, seed: int
) -> None:
    rows = labelled(*given_rows)
    spec = AugmentSpec(times=times, seed=seed)
    found, counts = augment(rows, spec, "text_classification")
    assert found[: len(rows)] == rows
    copies = found[len(rows) :]
    assert counts == {"rows": len(rows), "copies": len(copies), "not_made": times * len(rows) - len(copies)}
    assert len({copy.text for copy in copies} - {row.text for row in rows}) == len(copies)
    assert [copy.where.index for copy in copies] == sorted(copy.where.index for copy in copies)
    by_place = {row.where: row for row in rows}
    for copy in copies:
        original = by_place[copy.where]
        assert replace(copy, text=original.text) == original
    assert max(Counter(copy.where for copy in copies).values(), default=0) <= times
    assert augment(rows, spec, "text_classification") == (found, counts)


def test_no_copy_is_a_held_out_row_and_another_seed_makes_others() -> None:
    rows = labelled(("big dog", "0"), ("small cat", "1"))
    spec = AugmentSpec(times=1, edits=("swap",))
    assert [row.text for row in augment(rows, spec, "text_classification")[0][2:]] == ["dog big", "cat small"]
    held = labelled(("dog big", "0"))
    found, counts = augment(rows, spec, "text_classification", held_out=held)
    assert [row.text for row in found[2:]] == ["cat small"]
    assert counts["not_made"] == 1
    long = labelled(("one two three four five six seven eight", "0"), ("nine", "1"))
    made = {augment(long, AugmentSpec(times=1, seed=n), "text_classification")[0][2].text for n in range(6)}
    assert len(made) > 3


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = labelled(*((f"some words about thing number {chr(97 + n)}", str(n % 2)) for n in range(12)))
    spec = AugmentSpec(times=2)
    found, backwards = (augment(each, spec, "text_classification")[0] for each in (rows, rows[::-1]))
    assert found[12:] == backwards[12:]


TYPES = ("PER", "LOC")
segments = st.lists(
    st.one_of(
        st.tuples(st.just("O"), st.lists(st.sampled_from(PLAIN + KEPT), min_size=1, max_size=4)),
        st.tuples(st.sampled_from(TYPES), st.lists(st.sampled_from(["Ann", "Bo", "Rome", "New", "York"]), min_size=1)),
    ),
    min_size=1,
    max_size=5,
)


def tagged(parts: list[tuple[str, list[str]]], index: int) -> TaskRow:
    words = [word for _, each in parts for word in each]
    tags = [
        "O" if kind == "O" else f"{'B' if at == 0 else 'I'}-{kind}" for kind, each in parts for at in range(len(each))
    ]
    return TaskRow(where(index), words=tuple(words), target=tuple(tags))


def entities(row: TaskRow) -> list[tuple[str, tuple[str, ...]]]:
    return [(kind, row.words[start:end]) for start, end, kind in mentions(row.target) or ()]


@settings(deadline=None)
@given(st.lists(segments, min_size=1, max_size=5), st.integers(1, 3), st.floats(0.05, 0.5))
def test_tags_stay_bio_and_mentions_stay_mentions_of_their_type(given_rows: Any, times: int, rate: float) -> None:
    rows = [tagged(parts, index) for index, parts in enumerate(given_rows)]
    known = {entity for row in rows for entity in entities(row)}
    found, _ = augment(rows, AugmentSpec(times=times, rate=rate), "token_classification")
    for copy in found[len(rows) :]:
        original = rows[copy.where.index]
        assert len(copy.words) == len(copy.target)
        for before, tag in zip(("O", *copy.target), copy.target, strict=False):
            assert not tag.startswith("I-") or before in (tag, f"B-{tag[2:]}")
        assert [kind for kind, _ in entities(copy)] == [kind for kind, _ in entities(original)]
        assert set(entities(copy)) <= known

        def outside(row: TaskRow) -> Counter[str]:
            return Counter(word for word, tag in zip(row.words, row.target, strict=True) if tag == "O")

        assert outside(copy) == outside(original)


def test_a_mention_is_replaced_by_another_of_its_type_whatever_its_length() -> None:
    rows = [tagged([("PER", ["Ann", "Lee"]), ("O", ["left", "."])], 0), tagged([("PER", ["Bo"])], 1)]
    found, counts = augment(rows, AugmentSpec(times=3, edits=("mention",)), "token_classification")
    assert [(row.words, row.target) for row in found[2:]] == [
        (("Bo", "left", "."), ("B-PER", "O", "O")),
        (("Ann", "Lee"), ("B-PER", "I-PER")),
    ]
    assert counts == {"rows": 2, "copies": 2, "not_made": 4}  # there is only one other name


def test_parts_of_speech_are_no_mentions_and_nothing_outside_of_them() -> None:
    rows = [TaskRow(where(0), words=("dogs", "bark"), target=("NOUN", "VERB"))]
    found, counts = augment(rows, AugmentSpec(times=2), "token_classification")
    assert found == rows
    assert counts["not_made"] == 2


@settings(deadline=None)
@given(texts, texts, st.integers(1, 3))
def test_only_the_question_is_edited_so_every_answer_still_stands_in_its_context(
    context: str, question: str, times: int
) -> None:
    answers = (Answer(context[1:5], 1),)
    row = TaskRow(where(0), text=context, pair=question, target=answers)
    found, _ = augment([row], AugmentSpec(times=times), "extractive_qa")
    for copy in found[1:]:
        assert copy.text == context
        assert copy.pair != question
        assert copy.target == answers


@pytest.mark.parametrize("task", ["image_classification", "translation", "summarization"])
def test_tasks_whose_target_an_edit_may_change_are_refused(task: Any) -> None:
    with pytest.raises(ConfigError, match=rf"times=1: no edit is known to keep the target in {task}"):
        augment([], AugmentSpec(times=1), task)
    assert augment([], AugmentSpec(), task) == ([], {"rows": 0, "copies": 0, "not_made": 0})


@pytest.mark.parametrize(
    ("task", "chosen", "paired", "named"),
    [
        ("text_classification", ("mention", "swap"), False, "mention may change"),
        ("text_classification", ("delete", "typo"), True, "delete may change the target in text_classification of two"),
        ("extractive_qa", ("swap",), False, "swap may change"),
        ("token_classification", ("typo",), False, "typo may change"),
    ],
)
def test_edits_that_a_task_does_not_allow_are_refused(task: Any, chosen: Any, paired: bool, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        edits_for(task, AugmentSpec(times=1, edits=chosen), paired=paired)


def test_rows_of_two_texts_keep_all_their_words_in_place() -> None:
    row = TaskRow(where(0), text="A man plays guitar", pair="Somebody makes music", target="entailment")
    found, counts = augment([row], AugmentSpec(times=16), "text_classification")
    assert counts["copies"] > 8
    for copy in found[1:]:
        assert len(copy.text.split()) == 4
        assert len((copy.pair or "").split()) == 3
        assert [one[0].casefold() for one in copy.text.split()] == ["a", "m", "p", "g"]
