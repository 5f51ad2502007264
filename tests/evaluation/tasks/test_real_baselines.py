"""Baselines on real data: about where others have them, and far from where a bug would put them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from peftkit.base.head import Head
from peftkit.data.tasks.read import read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskRow
from peftkit.evaluation.tasks.baselines import baselines
from peftkit.evaluation.tasks.scores import difference, score
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec

SPEC = TaskEvaluateSpec(resamples=200)


def rows_of(task: str, source: Path, **columns: object) -> list[TaskRow]:
    return list(read_rows(TaskSpec(task=task, **columns), str(source)).rows)  # type: ignore[arg-type]


@pytest.mark.full
def test_sst2(test_data: Path) -> None:
    train, held = (
        rows_of("text_classification", test_data / "sst2" / f"{part}.tsv", columns=("text", "label"), label="label")
        for part in ("train", "test")
    )
    assert (len(train), len(held)) == (6920, 1821)
    head = Head("sequence", ("0", "1"))
    found = baselines("text_classification", head, train, held)
    majority, words = (score("text_classification", head, held, given, SPEC).metrics for given in found.values())
    assert majority["accuracy"].point == pytest.approx(0.4992, abs=1e-4)  # type: ignore[union-attr]
    # Bags of words and bigrams reach 79.4 to 83.1 % here (Socher et al. 2013, table 1: NB, SVM, BiNB).
    assert 0.794 < words["accuracy"].point < 0.831  # type: ignore[union-attr]
    change = difference("text_classification", head, held, found["majority"], found["TF-IDF + LR"], "accuracy", SPEC)
    assert change is not None
    assert change.low > 0.25


@pytest.mark.full
def test_ag_news(test_data: Path) -> None:
    source = test_data / "ag_news" / "test.csv"
    columns = ("class", "title", "text")
    rows = rows_of("text_classification", source, columns=columns, pair="title", label="class")
    random.Random(0).shuffle(rows)
    head = Head("sequence", ("1", "2", "3", "4"))
    train, held = rows[:5600], rows[5600:]
    assert len(held) == 2000
    found = baselines("text_classification", head, train, held)
    majority, words = (score("text_classification", head, held, given, SPEC).metrics for given in found.values())
    assert 0.2 < majority["accuracy"].point < 0.3  # type: ignore[union-attr]
    # With 120,000 rows a bag of words with TF-IDF has 89.6 % (Zhang et al. 2015, table 4); here 5,600.
    assert 0.86 < words["accuracy"].point < 0.90  # type: ignore[union-attr]


@pytest.mark.full
def test_wnut17_is_hard_for_a_lexicon(test_data: Path) -> None:
    train, held = (
        rows_of("token_classification", test_data / "wnut17" / name)
        for name in ("wnut17train.conll", "emerging.test.annotated")
    )
    assert (len(train), len(held)) == (3394, 1287)
    head = Head("token", tuple(sorted({tag for row in (*train, *held) for tag in row.target})))
    found = baselines("token_classification", head, train, held)
    figures = score("token_classification", head, held, found["most frequent tag"], SPEC).metrics
    # The set was built of entities not met before: nearly every tag is right, and nearly no span.
    assert figures["token_accuracy"].point > 0.9  # type: ignore[union-attr]
    assert 0.02 < figures["span_f1"].point < 0.12  # type: ignore[union-attr]


@pytest.mark.full
def test_xquad_is_scored_by_passage(test_data: Path) -> None:
    held = rows_of("extractive_qa", test_data / "xquad" / "xquad.en.json")
    assert len(held) == 1190
    found = baselines("extractive_qa", Head("span"), [], held)
    figures = {
        name: score("extractive_qa", Head("span"), held, given, SPEC).metrics["f1"] for name, given in found.items()
    }
    assert {interval.n for interval in figures.values() if interval} == {240}
    assert figures["no answer"].point == 0.0  # type: ignore[union-attr]
    like, longest = figures["sentence most like the question"], figures["longest sentence"]
    assert like is not None
    assert longest is not None
    assert 0.3 > like.low > longest.high > 0
