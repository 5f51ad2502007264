"""Figures worked by hand, and those of independent implementations of the same formulas."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss

from peftkit.base.head import Head
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, Prediction, TaskRow
from peftkit.evaluation.tasks.answers import exact_match, normalise, overlap
from peftkit.evaluation.tasks.calibration import expected_calibration_error
from peftkit.evaluation.tasks.metric import Measures
from peftkit.evaluation.tasks.scores import measure, score
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec

SPEC = TaskEvaluateSpec(resamples=100)
AB = Head("sequence", ("a", "b"))


def rows_of(targets: list, **fields: tuple) -> list[TaskRow]:
    return [TaskRow(Where("f", i, i), target=t, **{k: v[i] for k, v in fields.items()}) for i, t in enumerate(targets)]


def points(found: Measures) -> dict[str, float]:
    return {metric.name: metric.point for metric in found.metrics}


def ece(confidence: list[float], right: list[float]) -> float:
    values = expected_calibration_error(np.array(confidence), np.array(right, dtype=np.float64))
    return float(values(np.ones((1, len(right))))[0])


def test_ece_by_hand() -> None:
    # Bins of width 1/15: (.6, .667] holds .61 and .65, (.867, .933] holds .9 and .92, (.933, 1] holds .99.
    found = ece([0.61, 0.65, 0.9, 0.92, 0.99], [1, 0, 1, 1, 0])
    by_bin = 2 / 5 * abs(0.5 - 0.63) + 2 / 5 * abs(1 - 0.91) + 1 / 5 * abs(0 - 0.99)
    assert found == pytest.approx(by_bin, rel=1e-12)
    # Bins of equal size instead, as a sort by rank would have it, give another figure: 15 bins of ≤ 1 row each.
    assert found != pytest.approx(np.mean([0.39, 0.65, 0.1, 0.08, 0.99]), rel=1e-3)
    # Not |acc − conf| over all rows either.
    assert found != pytest.approx(abs(0.6 - np.mean([0.61, 0.65, 0.9, 0.92, 0.99])), rel=1e-3)


def test_ece_ends_and_edges() -> None:
    assert ece([1.0, 1.0], [1, 1]) == 0.0
    assert ece([0.0], [1]) == 1.0
    # 3/15 belongs to the bin below it, with .19; were it in the next, the two gaps of opposite sign would add up.
    assert ece([0.2, 0.19], [0, 1]) == pytest.approx(abs(0.5 - 0.195))


@given_(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_ece_is_the_plain_loop(pairs: list[tuple[float, bool]]) -> None:
    edges, total = np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = [(c, r) for c, r in pairs if low < c <= high or (c == 0 and low == 0)]
        if inside:
            total += len(inside) / len(pairs) * abs(np.mean([r for _, r in inside]) - np.mean([c for c, _ in inside]))
    assert ece([c for c, _ in pairs], [float(r) for _, r in pairs]) == pytest.approx(total, abs=1e-9)


def test_nll_and_brier_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels = ("b", "c", "a")  # not in sorted order: scikit-learn takes columns in sorted order
    odds = random.dirichlet(np.ones(3), 50)
    true = [str(label) for label in random.choice(labels, 50)]
    odds[0] = [float(label == true[0]) for label in labels][::-1] if true[0] != "c" else [1.0, 0.0, 0.0]
    given = [Prediction(labels[p.argmax()], float(p.max()), tuple(map(float, p))) for p in odds]
    found = points(measure("text_classification", Head("sequence", labels), rows_of(true), given))
    ordered = odds[:, [2, 0, 1]]
    assert found["nll"] == pytest.approx(log_loss(true, ordered, labels=["a", "b", "c"]), rel=1e-9)
    expected = brier_score_loss(true, ordered, labels=["a", "b", "c"], scale_by_half=False)
    assert found["brier"] == pytest.approx(expected, rel=1e-12)


def test_calibration_needs_a_probability_of_every_row() -> None:
    given = [Prediction("a", 0.9, (0.9, 0.1)), Prediction("b")]
    assert not {"ece", "nll", "brier"} & set(points(measure("text_classification", AB, rows_of(["a", "b"]), given)))


def test_labels_by_hand_with_a_label_that_is_never_met() -> None:
    # a: 2 hits, 1 false alarm, 1 miss → F1 4/6; b: 1 hit, 1 miss → 2/3; c: never wanted, never given → left out.
    head = Head("sequence", ("a", "b", "c"))
    given = [Prediction(v) for v in ("a", "a", "", "a", "b")]
    found = measure("text_classification", head, rows_of(["a", "a", "a", "b", "b"]), given)
    assert points(found) == pytest.approx({"accuracy": 3 / 5, "macro_f1": (4 / 6 + 2 / 3) / 2})
    assert found.labels["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert found.labels["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert found.notes == ("1 of 5 predictions name no label: they count as wrong",)


def test_one_class_present_is_measured_without_a_traceback() -> None:
    found = score("text_classification", AB, rows_of(["a"] * 12), [Prediction("a")] * 12, SPEC)
    assert found.value == 1.0
    assert found.metrics["accuracy"].low < 1.0  # type: ignore[union-attr]


def test_several_labels_with_none_anywhere_are_not_defined_rather_than_zero() -> None:
    head = Head("sequence", ("a", "b"), "multi_label")
    found = score("text_classification", head, rows_of([(), ()]), [Prediction(()), Prediction(())], SPEC)
    assert found.metrics["micro_f1"] is None
    assert found.metrics["subset_accuracy"].point == 1.0  # type: ignore[union-attr]
    assert any("micro_f1, macro_f1: not defined" in note for note in found.notes)


STARS = Head("sequence", ("stars",), "regression")


def test_numbers_by_hand() -> None:
    given = [Prediction(v) for v in (1.0, 2.0, 5.0)]
    found = points(measure("regression", STARS, rows_of([1.0, 3.0, 4.0]), given))
    # errors 0, −1, 1; squares of the references about 8/3: 25/9 + 1/9 + 16/9 = 42/9.
    assert found["rmse"] == pytest.approx(math.sqrt(2 / 3))
    assert found["r2"] == pytest.approx(1 - 2 / (42 / 9))
    assert found["pearson"] == pytest.approx(stats.pearsonr([1, 3, 4], [1, 2, 5]).statistic)
    assert found["spearman"] == pytest.approx(1.0)


def test_a_constant_prediction_has_an_error_and_no_correlation() -> None:
    found = score("regression", STARS, rows_of([1.0, 2.0, 6.0]), [Prediction(3.0)] * 3, SPEC)
    assert found.metrics["pearson"] is None
    assert found.metrics["spearman"] is None
    assert found.metrics["r2"].point == pytest.approx(0.0)  # type: ignore[union-attr]
    assert found.value == pytest.approx(math.sqrt(14 / 3))
    assert not found.higher_is_better
    same = score("regression", STARS, rows_of([0.1] * 3), [Prediction(v) for v in (0.1, 0.2, 0.3)], SPEC)
    assert same.metrics["r2"] is same.metrics["pearson"] is None


def test_an_answer_that_is_no_number_takes_the_mean_of_the_others_and_is_counted() -> None:
    given = [Prediction(1.0), Prediction(None), Prediction(5.0)]
    found = measure("regression", STARS, rows_of([1.0, 3.0, 5.0]), given)
    assert points(found)["rmse"] == 0.0
    assert "1 of 3 predictions are no number" in found.notes[0]
    none = score("regression", STARS, rows_of([1.0, 3.0]), [Prediction(None)] * 2, SPEC)
    assert none.value is None
    assert none.per_row is None


NER = Head("token", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))


def test_spans_are_strict() -> None:
    words = (("w",) * 4,) * 3
    wanted = [("B-PER", "I-PER", "O", "B-LOC"), ("B-LOC", "O", "O", "O"), ("O",) * 4]
    # Row 1: span too short (miss and false alarm), LOC found. Row 2: I- without B- opens no span. Row 3: false alarm.
    given = [
        Prediction(("B-PER", "O", "O", "B-LOC")),
        Prediction(("I-LOC", "O", "O", "O")),
        Prediction(("B-PER",) + ("O",) * 3),
    ]
    found = measure("token_classification", NER, rows_of(wanted, words=words), given)
    assert points(found) == pytest.approx(
        {"span_f1": 2 * 1 / (3 + 3), "span_precision": 1 / 3, "span_recall": 1 / 3, "token_accuracy": 9 / 12}
    )
    assert found.labels["PER"] == pytest.approx({"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1})
    assert found.per_row.tolist() == [0.75, 0.75, 0.75]


def test_no_spans_found_is_a_precision_that_is_not_defined() -> None:
    rows = rows_of([("B-PER", "O")], words=(("a", "b"),))
    found = score("token_classification", NER, rows, [Prediction(("O", "O"))], SPEC)
    assert found.metrics["span_precision"] is None
    assert found.value == 0.0
    empty = score("token_classification", NER, rows_of([("O",)], words=(("a",),)), [Prediction(("O",))], SPEC)
    assert empty.value is None


def test_squad_normalises_as_its_script_does() -> None:
    assert normalise("The  Cat's, an egg;  a theatre") == "cats egg theatre"
    # The script strips punctuation before articles: of "A-Team" the A is no word any more when articles go.
    assert normalise("The A-Team") == "ateam"
    assert exact_match("Denver Broncos", "the Denver Broncos!") == 1.0
    # 2 of 3 words shared out of 2 wanted: P = 2/3, R = 1.
    assert overlap("Denver Broncos", "Denver Broncos team") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert overlap("a b b c", "b b b") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert (overlap("", ""), overlap("the", "x"), overlap("x", "")) == (1.0, 0.0, 0.0)


def official_f1(gold: str, pred: str) -> float:
    """`compute_f1` of evaluate-v2.0.py, word for word."""
    gold_toks, pred_toks = normalise(gold).split(), normalise(pred).split()
    num_same = sum((Counter(gold_toks) & Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


@given_(st.text("ab, the.", max_size=20), st.text("ab, the.", max_size=20))
@settings(max_examples=200, deadline=None)
def test_squad_f1_is_the_scripts(gold: str, pred: str) -> None:
    assert overlap(gold, pred) == pytest.approx(official_f1(gold, pred), rel=1e-12)


def test_questions_with_and_without_an_answer() -> None:
    targets = [(Answer("in 1990", 0), Answer("1990", 3)), (Answer("Rome", 0),), (), ()]
    rows = rows_of(targets, text=("p1", "p2", "p3", "p4"))
    given = [Prediction("1990"), Prediction(""), Prediction(""), Prediction("x")]
    assert points(measure("extractive_qa", Head("span"), rows, given)) == {
        "f1": 0.5,
        "exact_match": 0.5,
        "has_answer_f1": 0.5,
        "has_answer_exact_match": 0.5,
        "no_answer_accuracy": 0.5,
    }
    only = points(measure("extractive_qa", Head("span"), rows[:2], given[:2]))
    assert only == {"f1": 0.5, "exact_match": 0.5}


def test_bleu_pays_for_brevity() -> None:
    # All n-grams of the answer are right, r = 12 words, c = 8: nothing but the penalty e^(1 − r/c) is left.
    reference = "one two three four five six seven eight nine ten eleven twelve"
    given = [Prediction(" ".join(reference.split()[:8]))]
    found = measure("translation", Head("seq2seq"), rows_of([reference]), given)
    assert points(found)["bleu"] == pytest.approx(100 * math.exp(1 - 12 / 8), rel=1e-9)
    assert (
        points(found)["bleu"]
        < points(measure("translation", Head("seq2seq"), rows_of([reference]), [Prediction(reference + " more")]))[
            "bleu"
        ]
    )
    assert "tok:13a" in found.signatures["bleu"]
    assert "nc:6" in found.signatures["chrf"]


def test_bleu_of_a_set_is_not_the_mean_of_its_sentences() -> None:
    rows = rows_of(["the cat sat on the mat today", "a dog ran far away from home"])
    given = [Prediction("the cat sat on the mat today"), Prediction("a dog")]
    found = measure("translation", Head("seq2seq"), rows, given)
    bleu = next(metric for metric in found.metrics if metric.name == "bleu")
    alone = bleu.values(np.eye(2))
    assert bleu.values(np.ones((1, 2)))[0] == pytest.approx(bleu.point)
    assert abs(bleu.point - alone.mean()) > 1


def test_rouge_l_from_the_longest_common_subsequence() -> None:
    # Stemmed, all four words of the reference stand in the answer in their order: P = 4/5, R = 1.
    found = measure(
        "summarization",
        Head("seq2seq"),
        rows_of(["police killed the gunman"]),
        [Prediction("police kill the gunman now")],
    )
    assert points(found)["rougeL"] == pytest.approx(2 * 0.8 / 1.8)
    # Order counts: of "the gunman police killed" only two words in a row can be kept.
    turned = measure(
        "summarization",
        Head("seq2seq"),
        rows_of(["police killed the gunman"]),
        [Prediction("the gunman police killed")],
    )
    assert points(turned)["rougeL"] == pytest.approx(0.5)
    assert points(turned)["rouge1"] == 1.0


def test_rouge_says_where_it_sees_nothing() -> None:
    found = measure(
        "summarization", Head("seq2seq"), rows_of(["天气很好", "fine"]), [Prediction("天气很好"), Prediction("fine")]
    )
    assert found.notes == ("1 of 2 references have no letters a to z: ROUGE sees nothing of them",)
    assert points(found)["rouge1"] == 0.5
