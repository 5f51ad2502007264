"""Every metric of every task: the library's value on all rows, and on any resample of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest

from peftkit.base.head import Head
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, Prediction, TaskName, TaskRow
from peftkit.errors import ConfigError, DataError
from peftkit.evaluation.compare import wilson
from peftkit.evaluation.tasks.resample import weights
from peftkit.evaluation.tasks.scores import difference, measure, score, units
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec

SPEC = TaskEvaluateSpec(resamples=300)
Set = tuple[TaskName, Head, list[TaskRow], list[Prediction]]
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "blue", "green", "House", "of", "Paris", "12", ",", "."]


def place(index: int) -> Where:
    return Where("rows.jsonl", index + 1, index)


def single(random: np.random.Generator, n: int) -> Set:
    # Rare labels, one that never occurs, and answers that name no label.
    labels = ("a", "b", "rare", "never")
    true = random.choice(labels[:3], n, p=[0.55, 0.4, 0.05])
    given = [t if random.random() < 0.6 else str(random.choice(["a", "b", "rare", ""])) for t in true]
    odds = random.dirichlet(np.ones(4), n)
    rows = [TaskRow(place(i), target=str(t)) for i, t in enumerate(true)]
    return "text_classification", Head("sequence", labels), rows, [
        Prediction(g, float(p.max()), tuple(map(float, p))) for g, p in zip(given, odds, strict=True)
    ]  # fmt: skip


def several(random: np.random.Generator, n: int) -> Set:
    labels = ("x", "y", "z")

    def some() -> tuple[str, ...]:
        return tuple(label for label in labels if random.random() < 0.4)

    rows = [TaskRow(place(i), target=some()) for i in range(n)]
    return "text_classification", Head("sequence", labels, "multi_label"), rows, [Prediction(some()) for _ in rows]


def numbers(random: np.random.Generator, n: int) -> Set:
    # Few distinct values: ties; far from 0: digits to lose.
    true = 1e4 + random.integers(0, 6, n)
    given = true + random.integers(-2, 3, n)
    rows = [TaskRow(place(i), target=float(t)) for i, t in enumerate(true)]
    return "regression", Head("sequence", ("stars",), "regression"), rows, [Prediction(float(g)) for g in given]


def tagged(labels: tuple[str, ...]) -> Callable[[np.random.Generator, int], Set]:
    def build(random: np.random.Generator, n: int) -> Set:
        rows, given = [], []
        for i in range(n):
            tags = [str(tag) for tag in random.choice(labels, random.integers(1, 9))]
            rows.append(TaskRow(place(i), words=("w",) * len(tags), target=tuple(tags)))
            given.append(Prediction(tuple(t if random.random() < 0.7 else str(random.choice(labels)) for t in tags)))
        return "token_classification", Head("token", labels), rows, given

    return build


def text(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(1, 12)))


def questions(random: np.random.Generator, n: int) -> Set:
    rows = [
        TaskRow(place(i), text=f"passage {i}", target=tuple(Answer(text(random), 0) for _ in range(random.integers(3))))
        for i in range(n)
    ]
    given = [Prediction(text(random) if random.random() < 0.7 else "") for _ in rows]
    return "extractive_qa", Head("span"), rows, given


def texts(task: TaskName) -> Callable[[np.random.Generator, int], Set]:
    def build(random: np.random.Generator, n: int) -> Set:
        rows = [TaskRow(place(i), target=text(random)) for i in range(n)]
        given = [Prediction(row.target + " " + text(random) if random.random() < 0.5 else text(random)) for row in rows]
        return task, Head("seq2seq"), rows, given

    return build


SETS = {
    "single": (single, {"accuracy", "macro_f1", "ece", "nll", "brier"}),
    "several": (several, {"micro_f1", "macro_f1", "subset_accuracy"}),
    "numbers": (numbers, {"rmse", "r2", "pearson", "spearman"}),
    "spans": (
        tagged(("O", "B-A", "I-A", "B-B", "I-B")),
        {"span_f1", "span_precision", "span_recall", "token_accuracy"},
    ),
    "tags": (tagged(("NN", "VB", "DT")), {"token_accuracy", "macro_f1"}),
    "questions": (
        questions,
        {"f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_accuracy"},
    ),
    "translation": (texts("translation"), {"chrf", "bleu"}),
    "summarization": (texts("summarization"), {"rouge1", "rouge2", "rougeL"}),
}


@pytest.mark.parametrize("name", SETS)
def test_any_resample_of_a_metric_is_the_librarys_value_on_the_resampled_rows(name: str) -> None:
    build, metrics = SETS[name]
    random = np.random.default_rng(7)
    task, head, rows, given = build(random, 40)
    found = measure(task, head, rows, given)
    assert {metric.name for metric in found.metrics} == metrics
    draws = [np.arange(40), *(random.integers(0, 40, 40) for _ in range(8))]
    again = [measure(task, head, [rows[i] for i in d], [given[i] for i in d]) for d in draws]
    drawn = np.array([np.bincount(d, minlength=40) for d in draws], dtype=np.float64)
    for i, metric in enumerate(found.metrics):
        library = [part.metrics[i].point for part in again]
        np.testing.assert_allclose(metric.values(drawn), library, rtol=1e-9, atol=1e-9, err_msg=metric.name)


@pytest.mark.parametrize("name", SETS)
def test_every_interval_holds_its_point_and_the_record_is_json(name: str) -> None:
    task, head, rows, given = SETS[name][0](np.random.default_rng(3), 40)
    found = score(task, head, rows, given, SPEC)
    for metric, interval in found.metrics.items():
        assert interval is not None, metric
        assert interval.n == 40
        # The bootstrap of an ECE lies above it: noise adds to |acc − conf| of a bin and never takes away.
        assert interval.low <= interval.point <= interval.high or metric == "ece", metric
        assert interval.low < interval.high, metric
    assert found.per_row is not None
    assert len(found.per_row) == 40
    json.dumps(found.record(), allow_nan=False)
    assert not {str(row.target) for row in rows if len(str(row.target)) > 12} & set(
        json.dumps(found.record()).split('"')
    )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("n", [1, 2])
def test_tiny_sets_give_no_nan_and_say_so(name: str, n: int) -> None:
    task, head, rows, given = SETS[name][0](np.random.default_rng(5), n)
    found = score(task, head, rows, given, SPEC)
    json.dumps(found.record(), allow_nan=False)
    for interval in found.metrics.values():
        assert interval is None or not math.isnan(interval.point)
        assert n > 1 or interval is None or (interval.low, interval.high) == (-math.inf, math.inf)
    assert n > 1 or any("nothing about the spread" in note for note in found.notes)


@pytest.mark.parametrize("name", SETS)
def test_a_contestant_against_itself_differs_by_nothing_at_all(name: str) -> None:
    task, head, rows, given = SETS[name][0](np.random.default_rng(3), 40)
    for metric in measure(task, head, rows, given).metrics:
        change = difference(task, head, rows, given, given, metric.name, SPEC)
        assert change is not None
        assert (change.point, change.low, change.high) == (0.0, 0.0, 0.0)


def test_the_difference_is_paired() -> None:
    # The second is right wherever the first is, and on one row more: unpaired draws would reach far below 0.
    rows = [TaskRow(place(i), target="ab"[i % 2]) for i in range(100)]
    head = Head("sequence", ("a", "b"))
    before = [Prediction(row.target if i < 50 else "ba"["ab".index(row.target)]) for i, row in enumerate(rows)]
    after = [*before[:50], *(Prediction(row.target) for row in rows[50:60]), *before[60:]]
    change = difference("text_classification", head, rows, before, after, "accuracy", SPEC)
    assert change is not None
    assert change.point == pytest.approx(0.1)
    assert 0 < change.low < 0.1 < change.high < 0.2
    back = difference("text_classification", head, rows, after, before, "accuracy", SPEC)
    assert back is not None
    assert (back.low, back.high) == pytest.approx((-change.high, -change.low))


def test_the_draws_depend_on_the_seed_and_the_units_only() -> None:
    first, again, other = (np.concatenate(list(weights(range(30), seed, 50))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.sum(axis=1) == 30).all()
    together = np.concatenate(list(weights([0, 0, 1, 1, 1, 2], 0, 200)))
    assert (together[:, 0] == together[:, 1]).all()
    assert (together[:, 2] == together[:, 4]).all()
    assert set(together[:, [0, 2, 5]].sum(axis=1)) == {3.0}


def test_questions_about_one_passage_are_drawn_together() -> None:
    rows = [TaskRow(place(i), text=f"passage {i // 10}", target=(Answer("x", 0),)) for i in range(40)]
    assert units("extractive_qa", rows) == [i // 10 for i in range(40)]
    given = [Prediction("x" if i < 20 else "y") for i in range(40)]
    together = score("extractive_qa", Head("span"), rows, given, SPEC).metrics["f1"]
    alone = [TaskRow(row.where, text=str(i), target=row.target) for i, row in enumerate(rows)]
    apart = score("extractive_qa", Head("span"), alone, given, SPEC).metrics["f1"]
    assert together is not None
    assert apart is not None
    assert together.n == 4
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_all_right_has_wilsons_interval_not_one_of_width_zero() -> None:
    rows = [TaskRow(place(i), target="ab"[i % 2]) for i in range(20)]
    given = [Prediction(row.target) for row in rows]
    found = score("text_classification", Head("sequence", ("a", "b")), rows, given, SPEC).metrics["accuracy"]
    assert found == wilson(20, 20)
    scores = score("text_classification", Head("sequence", ("a", "b")), rows, given, SPEC)
    assert any(note.startswith("macro_f1: every draw gives the same figure") for note in scores.notes)
    rows = [TaskRow(place(i), text=str(i), target=(Answer("x", 0),)) for i in range(20)]
    assert score("extractive_qa", Head("span"), rows, [Prediction("y")] * 20, SPEC).metrics["f1"] == wilson(0, 20)


def test_what_does_not_fit_is_named_row_by_row() -> None:
    head = Head("sequence", ("a", "b"))
    rows = [
        TaskRow(place(0), target="c"),
        TaskRow(place(1)),
        TaskRow(place(2), target="a"),
        TaskRow(place(3), target="a"),
    ]
    given = [Prediction("a"), Prediction("a"), Prediction("a", 1.0, (1.0,)), Prediction("a", float("nan"))]
    with pytest.raises(DataError) as caught:
        score("text_classification", head, rows, given, SPEC)
    said = str(caught.value)
    assert "4 of 4 rows" in said
    for part in (
        "rows.jsonl:1: the reference 'c'",
        "rows.jsonl:2: no reference",
        "1 probabilities for 2",
        "not finite",
    ):
        assert part in said
    with pytest.raises(DataError, match="3 predictions for 4 rows"):
        score("text_classification", head, rows, given[:3], SPEC)
    with pytest.raises(DataError, match=r"rows.jsonl:3: no prediction"):
        score("text_classification", head, rows[2:], [Prediction(None), Prediction("a")], SPEC)
    with pytest.raises(DataError, match="no rows"):
        score("text_classification", head, [], [], SPEC)
    many = [TaskRow(place(i)) for i in range(33)]
    with pytest.raises(DataError, match="and 13 more"):
        score("text_classification", head, many, [Prediction("a")] * 33, SPEC)


def test_tags_that_do_not_pair_up_are_named() -> None:
    rows = [TaskRow(place(0), words=("a", "b"), target=("O", "O")), TaskRow(place(1), words=("a",), target=("O", "O"))]
    given = [Prediction(("O",)), Prediction(("O", "O"))]
    with pytest.raises(DataError, match=r"1 tags predicted for 2 words(.|\n)*2 tags for 1 words"):
        score("token_classification", Head("token", ("O", "B-A", "I-A")), rows, given, SPEC)


def test_a_tag_that_is_none_is_refused_where_tags_mark_spans_and_wrong_where_they_do_not() -> None:
    rows = [TaskRow(place(0), words=("a", "b"), target=("O", "O"))]
    with pytest.raises(DataError, match="the prediction '' is no label"):
        score("token_classification", Head("token", ("O", "B-A", "I-A")), rows, [Prediction(("O", ""))], SPEC)
    rows = [TaskRow(place(0), words=("a", "b"), target=("NN", "NN"))]
    found = score("token_classification", Head("token", ("NN", "VB")), rows, [Prediction(("NN", ""))], SPEC)
    assert found.value == 0.5
    assert found.metrics["macro_f1"].point == pytest.approx(2 / 3)  # type: ignore[union-attr]


def test_a_metric_of_another_task_is_refused_by_name() -> None:
    task, head, rows, given = single(np.random.default_rng(0), 5)
    with pytest.raises(ConfigError, match=r"metric = bleu(.|\n)*one of accuracy, macro_f1"):
        score(task, head, rows, given, TaskEvaluateSpec(metric="bleu"))
    assert score(task, head, rows, given, TaskEvaluateSpec(metric="accuracy", resamples=100)).primary == "accuracy"


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("single", "sklearn"),
        ("numbers", "sklearn"),
        ("spans", "seqeval"),
        ("translation", "sacrebleu"),
        ("summarization", "rouge_score"),
    ],
)
def test_a_missing_package_is_an_error_that_names_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, head, rows, given = SETS[name][0](np.random.default_rng(3), 5)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}(.|\n)*pip install 'peftkit\[tasks\]'"):
        measure(task, head, rows, given)
