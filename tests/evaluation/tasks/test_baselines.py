"""Predictions that need no network: by hand, against scikit-learn, and blind to what they are to predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.dummy import DummyClassifier

from peftkit.base.head import Head
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, Prediction, TaskName, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.tasks.baselines import baselines, sentences
from peftkit.evaluation.tasks.scores import score
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec

MOOD = Head("sequence", ("sad", "glad"))
TAGS = Head("sequence", ("red", "big", "odd"), "multi_label")
STARS = Head("sequence", ("stars",), "regression")
NER = Head("token", ("O", "B-PER", "I-PER"))


def row(index: int = 0, **fields: object) -> TaskRow:
    return TaskRow(Where("f", index, index), **fields)  # type: ignore[arg-type]


def values(predictions: list[Prediction]) -> list:
    return [prediction.value for prediction in predictions]


TRAIN = [
    row(text=t, target=y)
    for t, y in [
        ("good day", "glad"),
        ("good food", "glad"),
        ("so good", "glad"),
        ("bad day", "sad"),
        ("so bad", "sad"),
    ]
]


def test_majority_and_words() -> None:
    held = [row(text="bad"), row(text="good"), row(text="nothing known")]
    found = baselines("text_classification", MOOD, TRAIN, held)
    assert list(found) == ["majority", "TF-IDF + LR"]
    assert found["majority"] == [Prediction("glad", 0.6, (0.4, 0.6))] * 3
    dummy = DummyClassifier(strategy="prior").fit([[0]] * 5, [r.target for r in TRAIN])
    assert dummy.predict_proba([[0]])[0].tolist() == [0.6, 0.4]  # glad, sad: scikit-learn sorts
    assert values(found["TF-IDF + LR"]) == ["sad", "glad", "glad"], "what is known of a word outweighs the majority"
    for prediction in found["TF-IDF + LR"]:
        assert sum(prediction.probabilities) == pytest.approx(1.0)
        assert prediction.confidence == max(prediction.probabilities)
        assert MOOD.labels[int(np.argmax(prediction.probabilities))] == prediction.value


def test_a_second_text_is_read_too() -> None:
    train = [row(text="q", pair=r.text, target=r.target) for r in TRAIN]
    found = baselines("text_classification", MOOD, train, [row(text="q", pair="bad bad")])
    assert values(found["TF-IDF + LR"]) == ["sad"]


def test_what_is_to_be_predicted_is_not_looked_at() -> None:
    held = [row(text="bad food", target="sad"), row(text="good", target="glad")]
    blind = [replace(each, target=None) for each in held]
    swapped = [replace(each, target="sad" if each.target == "glad" else "glad") for each in held]
    first, second, third = (baselines("text_classification", MOOD, TRAIN, part) for part in (held, blind, swapped))
    assert first == second == third


def test_a_label_without_training_rows_has_probability_0() -> None:
    head = Head("sequence", ("never", "glad", "sad"))
    found = baselines("text_classification", head, TRAIN, [row(text="bad")])["TF-IDF + LR"]
    assert found[0].probabilities[0] == 0.0
    only = baselines("text_classification", MOOD, TRAIN[:3], [row(text="bad")])["TF-IDF + LR"]
    assert only == [Prediction("glad", 1.0, (0.0, 1.0))]


def test_texts_without_a_word_leave_the_majority() -> None:
    assert list(baselines("text_classification", MOOD, [row(text="!", target="sad")], [row(text="?")])) == ["majority"]


def test_several_labels() -> None:
    train = [
        row(text=t, target=y)
        for t, y in [
            ("red ball", ("red",)),
            ("red car", ("red",)),
            ("big red", ("red", "big")),
            ("big", ("big",)),
            ("x", ()),
        ]
    ]
    found = baselines("text_classification", TAGS, train * 20, [row(text="red big"), row(text="unknown")])
    assert found["majority"][0] == Prediction(("red",), None, (0.6, 0.4, 0.0))
    assert found["TF-IDF + LR"][0].value == ("red", "big")
    assert found["TF-IDF + LR"][0].probabilities[2] == 0.0


def test_numbers() -> None:
    train = [row(text=t, target=y) for t, y in [("good", 5.0), ("good good", 5.0), ("bad", 1.0), ("bad day", 1.0)]]
    found = baselines("regression", STARS, train, [row(text="good"), row(text="bad")])
    assert values(found["mean"]) == [3.0, 3.0]
    better, worse = values(found["TF-IDF + ridge"])
    assert better > 3.5
    assert worse < 2.5


def test_the_most_frequent_tag_and_o_for_the_unknown() -> None:
    train = [
        row(words=("Ada", "Byron", "met", "Ada"), target=("B-PER", "I-PER", "O", "B-PER")),
        row(words=("Ada", "met", "met"), target=("O", "B-PER", "O")),
    ]
    found = baselines("token_classification", NER, train, [row(words=("Byron", "met", "Ada", "Byron", "ada"))])
    # Byron is I-PER in training; first in its row it opens a span, after Ada it goes on with hers.
    assert values(found["most frequent tag"]) == [("B-PER", "O", "B-PER", "I-PER", "O")]
    pos = Head("token", ("NN", "VB"))
    train = [row(words=("a", "b", "c"), target=("NN", "NN", "VB"))]
    assert values(baselines("token_classification", pos, train, [row(words=("c", "z"))])["most frequent tag"]) == [
        ("VB", "NN")
    ]


def test_questions() -> None:
    text = "Rome was not built in a day, as they say. It is in Italy! Who built Paris?"
    found = baselines(
        "extractive_qa", Head("span"), [], [row(text=text, pair="Is it in Italy", target=(Answer("Italy", 0),))]
    )
    assert {name: part[0].value for name, part in found.items()} == {
        "longest sentence": "Rome was not built in a day, as they say.",
        "sentence most like the question": "It is in Italy!",
        "no answer": "",
    }
    assert values(baselines("extractive_qa", Head("span"), [], [row(text="", pair="?")])["longest sentence"]) == [""]


def test_lead_and_source() -> None:
    text = 'One. Two said "so." Three! 四。五。\nSix'
    assert sentences(text) == ["One.", 'Two said "so."', "Three!", "四。", "五。", "Six"]
    found = baselines("summarization", Head("seq2seq"), [], [row(text="One. Two? Three! Four.")])
    assert {name: part[0].value for name, part in found.items()} == {"lead-3": "One. Two? Three!", "lead-1": "One."}
    assert values(baselines("translation", Head("seq2seq"), [], [row(text="ein Hund")])["source"]) == ["ein Hund"]


def test_images(tmp_path: Path) -> None:
    rows = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((20, 30, 3), 220 if i % 2 else 30, np.uint8)).save(path)
        rows.append(row(i, image=path, target="glad" if i % 2 else "sad"))
    found = baselines("image_classification", Head("image", MOOD.labels), rows[:10], rows[10:])
    assert values(found["pixels + LR"]) == ["sad", "glad"]
    assert values(found["majority"]) == ["sad", "sad"]
    (tmp_path / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0\.png: is not an image"):
        baselines("image_classification", Head("image", MOOD.labels), rows[:10], rows[10:])


@pytest.mark.parametrize("task", ["text_classification", "regression", "token_classification", "image_classification"])
def test_what_learns_needs_rows(task: TaskName) -> None:
    with pytest.raises(DataError, match="no training rows"):
        baselines(task, MOOD, [], [row(text="a")])


def test_every_baseline_can_be_scored_and_the_majority_is_calibrated_on_its_own_rows() -> None:
    spec = TaskEvaluateSpec(resamples=100)
    for predictions in baselines("text_classification", MOOD, TRAIN, TRAIN).values():
        found = score("text_classification", MOOD, TRAIN, predictions, spec)
        assert {"ece", "nll", "brier"} <= set(found.metrics)
    ece = score(
        "text_classification", MOOD, TRAIN, baselines("text_classification", MOOD, TRAIN, TRAIN)["majority"], spec
    ).metrics["ece"]
    assert ece is not None
    assert ece.point == pytest.approx(0.0, abs=1e-12)
