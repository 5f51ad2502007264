"""Outputs become answers: values worked by hand, and outputs that are the targets give the rows back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import IGNORED
from peftkit.data.readers import Where
from peftkit.data.tasks.decode import decode
from peftkit.data.tasks.encode import encode
from peftkit.data.tasks.spans import best_span
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import Answer, Prediction, TaskExample, TaskName, TaskRow
from peftkit.errors import DataError

WHERE = Where("rows.csv", 1, 0)
SPAN = Head("span")
Array = np.ndarray[Any, np.dtype[Any]]
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


def as_targets(head: Head, examples: Sequence[TaskExample]) -> list[Array]:
    """Outputs of a model that knows the targets: 9 where one is, 0 elsewhere."""
    outputs: list[Array] = []
    for one in examples:
        if head.kind == "span":
            scores = np.zeros((len(one.input_ids), 2), np.float32)
            scores[int(one.target[0]), 0] = scores[int(one.target[1]), 1] = 9
        elif head.kind == "token":
            scores = np.zeros((len(one.input_ids), len(head.labels)), np.float32)
            for at, value in enumerate(one.target):
                if value != IGNORED:
                    scores[at, int(value)] = 9
        elif head.problem == "regression":
            scores = np.array(one.target, np.float32)
        elif head.problem == "multi_label":
            scores = 9 * (2 * np.array(one.target, np.float32) - 1)
        else:
            scores = np.zeros(len(head.labels), np.float32)
            scores[int(one.target[0])] = 9
        outputs.append(scores)
    return outputs


def round_trip(
    head: Head, rows: Sequence[TaskRow], tokenizer: Tokenizer | None, task: TaskName, **spec: Any
) -> list[Any]:
    limit = spec.pop("limit", None)
    encoded = encode(rows, head, tokenizer, limit, TaskSpec(task=task, **spec))
    found = decode(head, rows, encoded.examples, as_targets(head, encoded.examples), task=task, max_answer_tokens=10**6)
    return [prediction.value for prediction in found]


# By hand


def one_text(head: Head, scores: Sequence[float], **given: Any) -> Prediction:
    example = TaskExample((1, 2), (), 0, "rows.csv:1")
    return decode(head, [TaskRow(WHERE)], [example], [np.array(scores)], task="text_classification", **given)[0]


def test_softmax_of_log_weights_is_their_share() -> None:
    found = one_text(Head("sequence", ("a", "b", "c")), [math.log(1), math.log(6), math.log(3)])
    assert found.value == "b"
    assert found.confidence == pytest.approx(0.6, abs=1e-15)
    assert found.probabilities == pytest.approx((0.1, 0.6, 0.3), abs=1e-15)


def test_labels_are_chosen_from_the_threshold_up() -> None:
    head = Head("sequence", ("a", "b", "c"), "multi_label")
    scores = [0.0, math.log(3), -math.log(3)]  # sigmoids 1/2, 3/4, 1/4
    found = one_text(head, scores)
    assert found.value == ("a", "b")
    assert found.confidence == pytest.approx(0.5 * 0.75 * 0.75, abs=1e-15)
    assert one_text(head, scores, threshold=0.6).value == ("b",)
    assert one_text(head, scores, threshold=0.8).value == ()


def test_extreme_scores_do_not_overflow() -> None:
    with np.errstate(over="raise", invalid="raise"):
        found = one_text(Head("sequence", ("a", "b"), "multi_label"), [1e4, -1e4])
        assert (found.value, found.probabilities, found.confidence) == (("a",), (1.0, 0.0), 1.0)
        assert one_text(Head("sequence", ("a", "b")), [1e4, -1e4]).probabilities == (1.0, 0.0)


def test_a_number_is_the_output() -> None:
    assert one_text(Head("sequence", ("score",), "regression"), [2.5]) == Prediction(2.5)


def test_outputs_that_are_wrong_are_refused() -> None:
    head = Head("sequence", ("a", "b"))
    with pytest.raises(DataError, match="1 values that are not finite"):
        one_text(head, [math.nan, 0])
    with pytest.raises(DataError, match="shape"):
        one_text(head, [0, 0, 0])
    with pytest.raises(DataError, match="2 sequences"):
        decode(head, [], [TaskExample((1,), (), 0, "x")] * 2, [], task="text_classification")
    with pytest.raises(DataError, match="is generated"):
        decode(Head("seq2seq"), [], [], [], task="translation")


def test_words_are_read_where_they_count() -> None:
    head = Head("token", ("O", "B-x", "I-x"))
    row = TaskRow(WHERE, words=("u", "v", "w"))
    first = TaskExample((1, 2, 3), (), 0, "r", words=(1,), first_word=0, per_token=True)
    second = TaskExample((1, 2, 3), (), 0, "r", words=(2, -1), first_word=1, per_token=True)
    log = math.log
    outputs = [
        np.array([[9, 9, 0], [0, log(2), 0], [9, 0, 9]]),  # word u at position 1: B-x with 2/4
        np.array([[0, 9, 0], [0, 9, 0], [0, 0, log(8)]]),  # word v at position 2: I-x with 8/10; w has no token
    ]
    found = decode(head, [row], [first, second], outputs, task="token_classification")[0]
    assert found.value == ("B-x", "I-x", "O")
    assert found.confidence == pytest.approx(0.4, abs=1e-15)


def test_rows_without_a_sequence_have_no_value() -> None:
    rows = [TaskRow(WHERE), TaskRow(WHERE)]
    example = TaskExample((1,), (), 1, "r")
    found = decode(Head("sequence", ("a", "b")), rows, [example], [np.array([0.0, 1.0])], task="text_classification")
    assert [one.value for one in found] == [None, "b"]


def spans(*windows: tuple[Sequence[float], Sequence[float], Sequence[tuple[int, int]]], **given: Any) -> Prediction:
    row = TaskRow(WHERE, text="ab cd ef", pair="q")
    examples = [TaskExample(range(len(start)), (), 0, "r", offsets=tuple(offsets)) for start, _, offsets in windows]
    outputs = [np.stack([start, end], axis=1) for start, end, _ in windows]
    return decode(SPAN, [row], examples, outputs, task="extractive_qa", **given)[0]


WORDS = ((0, 0), (0, 2), (3, 5), (6, 8))


def test_the_best_span_is_in_order_and_short_enough() -> None:
    # Alone, the best start is token 3 and the best end token 1: in order, 2–3 gives 2 + 4 = 6 and 1–3 gives 1 + 4 = 5.
    start, end = [0, 1, 2, 5], [0, 5, 0, 0.5]
    assert spans((start, end, WORDS)).value == "ab"  # 1–1: 6, above 3–3: 5.5
    start, end = [0, 4, 0, 0], [0, 0, 0, 4]
    assert spans((start, end, WORDS)).value == "ab cd ef"
    assert spans((start, end, WORDS), max_answer_tokens=2).value == "ab"  # 4 + 0, as the end 3 is too far


def test_tokens_outside_the_context_are_no_answer() -> None:
    assert spans(([0, 0, 9, 0], [0, 0, 9, 1], ((0, 0), (0, 2), (0, 0), (6, 8)))).value == "ef"


def test_no_answer_wins_by_the_lowest_score_of_all_windows() -> None:
    # Scores of no answer: 5 and 1; the best spans: 4 (second window: 3). 4 > min(5, 1).
    first = ([2, 0, 2, 0], [3, 0, 2, 0], WORDS)
    second = ([1, 0, 0, 2], [0, 0, 0, 1], WORDS)
    assert spans(first).value == ""
    assert spans(first, second).value == "cd"
    assert spans(first, second, null_bias=3.0).value == ""  # not above 1 + 3
    assert spans(first, second, null_bias=2.9).value == "cd"
    assert spans(first, null_bias=-math.inf).value == "cd"


def test_confidence_of_a_span_is_start_times_end() -> None:
    log = math.log
    found = spans(([0, log(5), 0, log(3)], [0, log(6), log(2), 0], WORDS))
    assert found.value == "ab"
    assert found.confidence == pytest.approx(5 / 10 * 6 / 10, abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), length=st.integers(1, 9), most=st.integers(1, 10))
def test_the_best_span_is_that_of_trying_all(data: st.DataObject, length: int, most: int) -> None:
    numbers = st.lists(st.integers(-5, 5), min_size=length, max_size=length)
    scores = np.array([data.draw(numbers), data.draw(numbers)], np.float64).T
    offsets = [
        (at, at + inside)
        for at, inside in enumerate(data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
    ]
    tried = [
        scores[first, 0] + scores[last, 1]
        for first in range(length)
        for last in range(first, min(length, first + most))
        if offsets[first][0] < offsets[first][1] and offsets[last][0] < offsets[last][1]
    ]
    found = best_span(scores, offsets, most)
    assert (found.score if found else None) == max(tried, default=None)
    if found:
        assert 0 <= found.last - found.first < most
        assert scores[found.first, 0] + scores[found.last, 1] == found.score


# Outputs that are the targets


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.sampled_from("abc")), min_size=1, max_size=6))
def test_labels_come_back(causal: Tokenizer, given_rows: list[tuple[str, str]]) -> None:
    rows = [TaskRow(WHERE, text=text, target=label) for text, label in given_rows]
    found = round_trip(Head("sequence", ("a", "b", "c")), rows, causal, "text_classification")
    assert found == [row.target for row in rows]


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=6))
def test_several_labels_come_back(causal: Tokenizer, sets: list[set[str]]) -> None:
    rows = [TaskRow(WHERE, text="t", target=tuple(sorted(labels))) for labels in sets]
    head = Head("sequence", ("a", "b", "c"), "multi_label")
    assert round_trip(head, rows, causal, "text_classification", multi_label=True) == [row.target for row in rows]


def test_numbers_come_back(causal: Tokenizer) -> None:
    rows = [TaskRow(WHERE, text="t", target=value) for value in (0.0, -2.5, 1024.0)]
    assert round_trip(Head("sequence", ("n",), "regression"), rows, causal, "regression") == [0.0, -2.5, 1024.0]


def test_images_come_back() -> None:
    rows = [TaskRow(WHERE, image=Path(f"{label}.png"), target=label) for label in "bab"]
    head = Head("image", ("a", "b"))
    assert round_trip(head, rows, None, "image_classification") == ["b", "a", "b"]
    examples = encode(rows, head, None, None, TaskSpec(task="image_classification"), positions=5).examples
    assert [list(one.input_ids) for one in examples] == [[0, 1, 2, 3, 4]] * 3
    assert examples[0].image == Path("b.png")


@settings(max_examples=50, deadline=None)
@given(data=st.data(), limit=st.integers(6, 24), stride=st.integers(0, 3), plain=st.booleans())
def test_tags_come_back_through_windows(
    encoder: Tokenizer, causal: Tokenizer, data: st.DataObject, limit: int, stride: int, plain: bool
) -> None:
    head = Head("token", ("O", "B-x", "I-x"))
    word = TEXTS.filter(lambda text: bool(text.strip()))
    tags = st.lists(st.tuples(word, st.sampled_from(head.labels)), min_size=1, max_size=12)
    rows = [
        TaskRow(WHERE, words=tuple(word for word, _ in one), target=tuple(tag for _, tag in one))
        for one in data.draw(st.lists(tags, min_size=1, max_size=3))
    ]
    found = round_trip(head, rows, causal if plain else encoder, "token_classification", limit=limit, stride=stride)
    for row, value in zip(rows, found, strict=True):
        if plain:
            assert value == row.target
        elif value is not None:  # words that BERT's normalizer removes are "O"
            assert all(tag in (said, "O") for tag, said in zip(value, row.target, strict=True))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), more=st.integers(1, 20), plain=st.booleans())
def test_answers_come_back_through_windows(
    encoder: Tokenizer, causal: Tokenizer, data: st.DataObject, more: int, plain: bool
) -> None:
    words = data.draw(st.lists(st.text("abcd½ö", min_size=1, max_size=4), min_size=1, max_size=20))
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    answer = " ".join(words[first : first + data.draw(st.integers(0, 2))])
    start = len(" ".join(words[:first])) + bool(first)
    rows = [TaskRow(WHERE, text=context, pair="wh?", target=(Answer(answer, start),) if answer else ())]
    # Two words of four signs: up to 8 tokens of the encoder; with their space, ½ and ö being two bytes, 17 bytes.
    stride, around = (17, 4) if plain else (8, 6)
    given_spec: dict[str, Any] = {"limit": stride + around + more, "stride": stride}
    assert round_trip(SPAN, rows, causal if plain else encoder, "extractive_qa", **given_spec) == [answer]
