"""A metric by a column: fairlearn's figures, honest gaps, and a planted unfairness that is found."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame, demographic_parity_difference, equalized_odds_difference
from sklearn.metrics import f1_score

from peftkit.base.head import Head
from peftkit.data.readers import Where
from peftkit.data.tasks.task import Answer, Prediction, TaskRow
from peftkit.errors import ConfigError
from peftkit.evaluation.tasks.slices import Slices, by_column
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec

SPEC = TaskEvaluateSpec(resamples=300, metric="accuracy")
HEAD = Head("sequence", ("no", "yes"))


def rows_of(targets: list, groups: list) -> list[TaskRow]:
    return [
        TaskRow(Where("f.csv", i + 2, i), columns={"group": group, "other": 1}, target=target)
        for i, (target, group) in enumerate(zip(targets, groups, strict=True))
    ]


def drawn(seed: int, n: int, wrong: dict[str, float]) -> tuple[list[TaskRow], list[Prediction]]:
    """Rows of two labels whose predictions are wrong at each group's own rate."""
    random = np.random.default_rng(seed)
    groups = [str(group) for group in random.choice(sorted(wrong), n)]
    targets = [str(target) for target in random.choice(["no", "yes"], n)]
    flip = {"no": "yes", "yes": "no"}
    given = [Prediction(flip[t] if random.random() < wrong[g] else t) for t, g in zip(targets, groups, strict=True)]
    return rows_of(targets, groups), given


def sliced(rows: list[TaskRow], given: list[Prediction], spec: TaskEvaluateSpec = SPEC) -> Slices:
    return by_column("text_classification", HEAD, rows, given, "group", spec)


def test_groups_and_gaps_are_fairlearns() -> None:
    rows, given = drawn(0, 120, {"a": 0.1, "b": 0.3, "c": 0.4})
    found = sliced(rows, given, TaskEvaluateSpec(resamples=300))
    true, said = [row.target for row in rows], [prediction.value for prediction in given]
    groups = [row.columns["group"] for row in rows]
    frame = MetricFrame(
        metrics=lambda a, b: f1_score(a, b, average="macro"), y_true=true, y_pred=said, sensitive_features=groups
    )
    assert found.metric == "macro_f1"
    assert {group.name: group.value.point for group in found.groups if group.value} == pytest.approx(
        dict(frame.by_group)
    )
    assert found.difference is not None
    assert found.ratio is not None
    assert found.difference.point == pytest.approx(frame.difference())
    assert found.ratio.point == pytest.approx(frame.ratio())
    binary = [int(label == "yes") for label in true], [int(label == "yes") for label in said]
    parity, odds = found.gaps["demographic_parity"], found.gaps["equalised_odds"]
    assert parity is not None
    assert odds is not None
    assert parity.point == pytest.approx(demographic_parity_difference(*binary, sensitive_features=groups))
    assert odds.point == pytest.approx(equalized_odds_difference(*binary, sensitive_features=groups))


def test_gaps_by_hand() -> None:
    # a: 3 of 4 selected, TPR 1, FPR 1/2; b: 1 of 4 selected, TPR 1/2, FPR 0.
    rows = rows_of(["yes", "yes", "no", "no"] * 2, ["a"] * 4 + ["b"] * 4)
    given = [Prediction(v) for v in ("yes", "yes", "yes", "no", "yes", "no", "no", "no")]
    found = sliced(rows, given)
    assert found.gaps["demographic_parity"].point == pytest.approx(0.5)  # type: ignore[union-attr]
    assert found.gaps["equalised_odds"].point == pytest.approx(0.5)  # type: ignore[union-attr]
    assert found.difference is not None
    assert found.difference.point == 0.0
    assert all(group.small for group in found.groups)


def test_the_larger_of_both_rates_is_the_equalised_odds_gap() -> None:
    # ΔTPR = 0, ΔFPR = 1: a minimum, or the true positive rate alone, would say 0.
    rows = rows_of(["yes", "no"] * 2, ["a", "a", "b", "b"])
    found = sliced(rows, [Prediction(v) for v in ("yes", "yes", "yes", "no")])
    assert found.gaps["equalised_odds"].point == 1.0  # type: ignore[union-attr]


def test_a_group_without_positives_has_no_true_positive_rate_to_fall_behind_with() -> None:
    # fairlearn takes its rate as 0 and reports a gap of 1; the other rates are alike.
    rows = rows_of(["yes", "no", "no", "no"], ["a", "a", "b", "b"])
    given = [Prediction(v) for v in ("yes", "no", "no", "no")]
    binary = [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert equalized_odds_difference(*binary, sensitive_features=["a", "a", "b", "b"]) == 1.0
    assert sliced(rows, given).gaps["equalised_odds"].point == 0.0  # type: ignore[union-attr]


def test_a_planted_unfairness_is_told_from_chance() -> None:
    fair, unfair = (sliced(*drawn(1, 400, {"a": 0.2, "b": rate})) for rate in (0.2, 0.45))
    assert unfair.chance is not None
    assert fair.chance is not None
    assert unfair.chance < 0.01 < 0.05 < fair.chance
    assert unfair.difference is not None
    assert unfair.difference.low > 0.1


def test_chance_holds_its_level_when_groups_are_alike() -> None:
    found = [
        sliced(*drawn(seed, 60, {"a": 0.3, "b": 0.3}), TaskEvaluateSpec(resamples=100, metric="accuracy"))
        for seed in range(20)
    ]
    low = sum(each.chance is not None and each.chance < 0.1 for each in found)
    # Binomial(20, ≤ 0.1): more than 6 has probability below 1 %.
    assert low <= 6


def test_small_groups_are_flagged_and_names_stay_in_the_run_folder() -> None:
    rows, given = drawn(2, 60, {"Müller": 0.2, "Schmidt": 0.2})
    rows[0] = TaskRow(rows[0].where, {"group": "Alone"}, target=rows[0].target)
    found = sliced(rows, given)
    assert [(group.name, group.small) for group in found.groups] == [
        ("Alone", True),
        ("Müller", False),
        ("Schmidt", False),
    ]
    assert found.groups[0].value is not None
    assert found.groups[0].value.high == math.inf
    kept = json.dumps(found.record(), allow_nan=False)
    assert not any(name in kept for name in ("Alone", "Müller", "Schmidt"))
    assert found.record()["small_groups"] == 1
    table = found.table()
    assert [line[0] for line in table[:3]] == ["Alone", "Müller", "Schmidt"]
    assert table[0][-1] == "fewer than 10 rows"
    assert [line[0] for line in table[-2:]] == ["demographic parity gap", "equalised odds gap"]


def test_a_missing_column_names_those_that_there_are() -> None:
    rows, given = drawn(0, 12, {"a": 0.1})
    rows[3] = TaskRow(rows[3].where, {"other": 1}, target=rows[3].target)
    with pytest.raises(ConfigError, match=r"1 of 12 rows have no column 'group', first f.csv:5(.|\n)*other"):
        sliced(rows, given)


def test_one_group_has_no_gap() -> None:
    found = sliced(*drawn(0, 12, {"a": 0.1}))
    assert found.difference is found.ratio is found.chance is None
    assert found.gaps == {"demographic_parity": None, "equalised_odds": None}
    json.dumps(found.record(), allow_nan=False)


def test_any_metric_can_be_sliced() -> None:
    rows = [
        TaskRow(Where("f", i, i), {"lang": "en" if i % 2 else "de"}, text=str(i // 4), target=(Answer("x", 0),))
        for i in range(40)
    ]
    given = [Prediction("x" if i % 2 or i < 10 else "y") for i in range(40)]
    found = by_column("extractive_qa", Head("span"), rows, given, "lang", TaskEvaluateSpec(resamples=200))
    assert {group.name: group.value.point for group in found.groups if group.value} == {"de": 0.25, "en": 1.0}
    assert found.gaps == {}
    rows = [TaskRow(Where("f", i, i), {"lang": "ab"[i % 2]}, target="ein kleiner Hund läuft") for i in range(20)]
    given = [Prediction("ein kleiner Hund läuft" if i % 2 else "ein Hund") for i in range(20)]
    for metric in ("chrf", "bleu"):
        spec = TaskEvaluateSpec(resamples=100, metric=metric)
        part = by_column("translation", Head("seq2seq"), rows, given, "lang", spec)
        assert part.groups[1].value is not None
        assert part.groups[1].value.point == pytest.approx(100.0)
        assert part.chance is not None
        assert part.chance < 0.01
