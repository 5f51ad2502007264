"""Contestants side by side: table, manifest figures without rows, samples, and a verdict that can be no."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from peftkit.base.head import Head
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, Prediction, TaskExample, TaskName, TaskPart, TaskRow
from peftkit.errors import ConfigError, DataError
from peftkit.evaluation.tasks.comparison import COLUMNS, TaskComparison, measured, measured_rows
from peftkit.evaluation.tasks.scores import difference
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Warned

HEAD = Head("sequence", ("no", "yes"))
SPEC = TaskEvaluateSpec(resamples=300)


def part(rows: list[TaskRow], left_out: tuple[int, ...] = ()) -> TaskPart:
    examples = [TaskExample([1, 2], (0.0,), i, str(row.where)) for i, row in enumerate(rows) if i not in left_out]
    # A second window of the first row that is measured: still one row.
    return TaskPart("held_out", "f.csv", "0" * 64, tuple(rows), (*examples, examples[0]))


def answers(rows: list[TaskRow], wrong: float, seed: int) -> list[Prediction]:
    random, flip = np.random.default_rng(seed), {"no": "yes", "yes": "no"}
    given = [flip[row.target] if random.random() < wrong else row.target for row in rows]
    return [Prediction(g, 0.8, (0.8, 0.2) if g == "no" else (0.2, 0.8)) for g in given]


def labelled(n: int) -> list[TaskRow]:
    return [
        TaskRow(
            Where("f.csv", i + 2, i),
            {"person": "Ada" if i % 3 else "Grace"},
            f"secret text {i}",
            target="yes" if i % 2 else "no",
        )
        for i in range(n)
    ]


def compared(wrong: dict[str, float], n: int = 200, spec: TaskEvaluateSpec = SPEC, **short: int) -> TaskComparison:
    rows = labelled(n)
    contestants = {
        name: answers(rows, rate, seed)[: short.get(name, n)] for seed, (name, rate) in enumerate(wrong.items())
    }
    return TaskComparison("text_classification", HEAD, part(rows), contestants, spec)


def test_the_best_baseline_stands_before_and_the_adapter_after() -> None:
    found = compared({"majority": 0.5, "words": 0.3, "adapter": 0.1})
    figures = found.figures()
    assert figures["other"]["best_baseline"] == "words"
    assert figures["before"] == found.scores("words").record()
    assert figures["after"] == found.scores("adapter").record()
    assert set(figures["other"]["baselines"]) == {"majority", "words"}
    change = difference(
        "text_classification",
        HEAD,
        found.measured,
        found.contestants["words"],
        found.contestants["adapter"],
        "macro_f1",
        SPEC,
    )
    assert change is not None
    assert figures["other"]["score_change"] == {"point": change.point, "low": change.low, "high": change.high}
    assert change.point == pytest.approx(figures["after"]["macro_f1"]["point"] - figures["before"]["macro_f1"]["point"])
    verdict = found.verdict()
    assert isinstance(verdict, Note)
    assert "beats the best baseline, words" in verdict.text
    assert found.objective() == ("macro_f1", found.scores("adapter").value, "max")


def test_an_adapter_that_is_ahead_by_chance_only_is_said_not_to_beat_the_baseline() -> None:
    found = compared({"words": 0.2, "adapter": 0.18}, n=60)
    assert found.lead is not None
    assert found.lead.change.low <= 0
    verdict = found.verdict()
    assert isinstance(verdict, Warned)
    assert "does not beat the best baseline, words" in verdict.text
    worse = compared({"words": 0.1, "adapter": 0.4}).verdict()
    assert isinstance(worse, Warned)
    alone = compared({"adapter": 0.1}).verdict()
    assert isinstance(alone, Warned)
    assert "no baseline" in alone.text


def test_lower_is_better_where_it_is() -> None:
    head, random = Head("sequence", ("stars",), "regression"), np.random.default_rng(0)
    rows = [TaskRow(Where("f", i, i), target=float(random.normal())) for i in range(80)]
    contestants = {
        "mean": [Prediction(0.0) for _ in rows],
        "ridge": [Prediction(row.target + float(random.normal(0, 0.5))) for row in rows],
        "adapter": [Prediction(row.target + float(random.normal(0, 0.1))) for row in rows],
    }
    found = TaskComparison("regression", head, part(rows), contestants, SPEC)
    assert found.figures()["other"]["best_baseline"] == "ridge"
    assert found.figures()["other"]["score_change"]["high"] < 0
    assert isinstance(found.verdict(), Note)
    assert found.objective()[2] == "min"
    assert found.scores("mean").metrics["pearson"] is None
    json.dumps(found.figures(), allow_nan=False)


def test_a_prompted_base_that_answered_some_rows_is_compared_on_these() -> None:
    found = compared({"words": 0.4, "base + 4 examples": 0.0, "adapter": 0.1}, **{"base + 4 examples": 48})
    assert found.lead is not None
    assert (found.lead.rival, found.lead.rows) == ("base + 4 examples", 48)
    assert "on the first 48 rows" in found.verdict().text
    first = [given[:48] for given in found.contestants.values()][1:]
    expected = difference("text_classification", HEAD, found.measured[:48], *first, "macro_f1", SPEC)
    assert found.lead.change == expected
    assert [line[-1] for line in found.rows()] == [200, 48, 200]
    assert "base + 4 examples" in found.samples()[47]
    assert "base + 4 examples" not in found.samples()[48]


def test_figures_hold_no_row_and_no_group_name() -> None:
    spec = TaskEvaluateSpec(resamples=100, slices=("person",))
    found = compared({"majority": 0.5, "adapter": 0.1}, spec=spec)
    kept = json.dumps(found.figures(), allow_nan=False)
    assert not any(word in kept for word in ("secret", "Ada", "Grace", "f.csv"))
    assert found.figures()["other"]["by_person"]["groups"] == 2
    assert {group.name for group in found.slices[0].groups} == {"Ada", "Grace"}
    with pytest.raises(ConfigError, match=r"no column 'gender'(.|\n)*person"):
        compared({"adapter": 0.1}, spec=TaskEvaluateSpec(slices=("gender",)))


def test_the_table_and_the_samples() -> None:
    found = compared({"majority": 0.5, "adapter": 0.1}, n=20)
    lines = found.rows()
    assert all(len(line) == len(COLUMNS) for line in lines)
    assert [line[0] for line in lines] == ["majority", "adapter"]
    assert all(line[5] for line in lines)
    samples = found.samples()
    assert samples[0].keys() == {"where", "reference", "majority", "adapter", "score", "correct"}
    assert all(line["correct"] == (line["adapter"] == line["reference"]) for line in samples)
    assert sum(line["correct"] for line in samples) / 20 == found.scores("adapter").metrics["accuracy"].point  # type: ignore[union-attr]
    json.dumps(samples, allow_nan=False)


def test_rows_that_were_left_out_are_measured_for_nobody() -> None:
    rows = labelled(12)
    held = part(rows, left_out=(0, 5))
    assert measured_rows(held) == [row for i, row in enumerate(rows) if i not in (0, 5)]
    assert measured(held, range(12)) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    contestants = {"adapter": answers(measured_rows(held), 0.0, 0)}
    assert TaskComparison("text_classification", HEAD, held, contestants, SPEC).scores("adapter").value == 1.0
    with pytest.raises(DataError, match="adapter: 12 predictions for 10 rows"):
        TaskComparison("text_classification", HEAD, held, {"adapter": answers(rows, 0.0, 0)}, SPEC)
    with pytest.raises(DataError, match="the last contestant is not 'adapter'"):
        TaskComparison(
            "text_classification", HEAD, held, {"adapter": contestants["adapter"], "x": contestants["adapter"]}, SPEC
        )
    with pytest.raises(DataError, match="adapter: 9 predictions for 10 rows"):
        TaskComparison("text_classification", HEAD, held, {"adapter": contestants["adapter"][:9]}, SPEC)


WORDS = ("Ada", "met", "Bob")
OTHERS: list[tuple[TaskName, Head, Any, Any]] = [
    ("token_classification", Head("token", ("O", "B-PER", "I-PER")), ("B-PER", "O", "B-PER"), ("B-PER", "O", "O")),
    ("extractive_qa", Head("span"), (Answer("Bob", 8),), ""),
    ("extractive_qa", Head("span"), (), "Ada"),
    ("text_classification", Head("sequence", ("a", "b"), "multi_label"), ("a",), ("a", "b")),
    ("translation", Head("seq2seq"), "Ada traf Bob", "Ada met Bob"),
    ("summarization", Head("seq2seq"), "They met.", "Ada met Bob"),
]


@pytest.mark.parametrize(("task", "head", "target", "wrong"), OTHERS)
@pytest.mark.parametrize("n", [1, 12])
def test_every_task_from_one_row_on(task: TaskName, head: Head, target: Any, wrong: Any, n: int) -> None:
    rows = [TaskRow(Where("f", i, i), {}, f"Ada met Bob {i}", words=WORDS, target=target) for i in range(n)]
    right = (target[0].text if target else "") if task == "extractive_qa" else target
    contestants = {"trivial": [Prediction(wrong)] * n, "adapter": [Prediction(right)] * n}
    found = TaskComparison(task, head, part(rows), contestants, SPEC)
    json.dumps([found.figures(), found.samples()], allow_nan=False)
    assert len(found.rows()) == 2
    assert isinstance(found.verdict(), Note if n > 1 else Warned)
    exact = task not in ("translation", "summarization")
    assert {line["correct"] for line in found.samples()} == {True if exact else None}
