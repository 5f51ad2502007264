"""ULMFiT's ablation: the rule of docs/decisions/0018, its rows and its courses; no run is made."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ulmfit_shape_rule")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ulmfit_shape_rows")


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("ulmfit_shape_arms")


@pytest.mark.parametrize(
    ("kind", "margin", "found", "verdict"),
    [
        ("more than", 5, (9, 6, 12, 1), "confirmed"),
        ("more than", 5, (9, 6, 12, 2.5), "inconclusive"),  # two standard errors over seeds reach below the margin
        ("more than", 5, (9, 4, 12, 1), "inconclusive"),
        ("more than", 5, (2, -1, 4.9, 1), "refuted"),
        ("more than", 0, (-2, -3, -1, 0.1), "refuted"),
        ("less than", 0, (-2, -3, -1, 0.1), "confirmed"),
        ("less than", 0, (-2, -3, -1, 1.5), "inconclusive"),
        ("less than", 0, (-2, -3, 0.1, 0.1), "inconclusive"),
        ("less than", 0, (2, 1, 3, 0.1), "refuted"),
        ("less than", 1.5, (0.5, -0.5, 1.4, 0.1), "confirmed"),
        ("less than", 1.5, (3, 1.6, 5, 0.1), "refuted"),
        ("within", 1.5, (0.2, -1, 1.4, 9), "confirmed"),
        ("within", 1.5, (0.2, -1.6, 1.4, 0), "inconclusive"),
        ("within", 1.5, (0.2, -1, 1.6, 0), "inconclusive"),
        ("within", 1.5, (3, 1.6, 5, 0), "refuted"),
        ("within", 1.5, (-3, -5, -1.6, 0), "refuted"),
        ("more than", 5, (9, 6, 12, math.nan), "inconclusive"),  # one seed says nothing of seeds
    ],
)
def test_a_difference_is_judged_by_the_table_of_the_rule(
    rule: ModuleType, kind: str, margin: float, found: tuple[float, ...], verdict: str
) -> None:
    assert rule.judge(kind, margin, rule.Difference(*found)) == verdict


def test_a_difference_is_the_mean_over_sets_seeds_and_rows_in_points(rule: ModuleType) -> None:
    one = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])  # 25, 50 and 75 %
    other = np.zeros((3, 2))
    found = rule.difference([one, other], resamples=200)
    assert found.point == pytest.approx(25)  # each set counts the same, however many rows it has
    assert found.error == pytest.approx(12.5 / math.sqrt(3))  # of 12.5, 25 and 37.5
    assert found.low < 25 < found.high


def test_the_interval_has_the_spread_of_resampled_seeds_and_rows(rule: ModuleType) -> None:
    random = np.random.default_rng(5)
    part = random.normal(size=(3, 40)) + random.normal(size=(3, 1))
    draws = []
    for _ in range(5_000):  # the definition, one draw at a time
        seeds, chosen = random.integers(0, 3, 3), random.integers(0, 40, 40)
        draws.append(100 * part[np.ix_(seeds, chosen)].mean())
    found = rule.difference([part])
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, rel=0.1), pytest.approx(high, rel=0.1))


def test_rows_that_never_differ_have_an_interval_of_no_width(rule: ModuleType) -> None:
    found = rule.difference([np.ones((3, 10)), np.zeros((3, 10))])
    assert (found.point, found.low, found.high, found.error) == pytest.approx((50, 50, 50, 0))


def _errors(shares: dict[tuple[str, str, int], float]) -> Any:
    """The first rows are wrong, at every seed."""

    def errors(data: str, arm: str, n: int) -> Any:
        share = shares.get((data, arm, n), 0.1)
        return np.tile((np.arange(200) < 200 * share).astype(float), (3, 1))

    return errors


def test_a_claim_about_every_arm_needs_each_and_falls_with_one(rule: ModuleType) -> None:
    claim = rule.CLAIMS[0]
    sets, names = ("sst2", "ag_news"), ("scratch", "full", "lora")
    far = {(data, "scratch", 100): 0.5 for data in sets}
    judged = rule.verdict(claim, 100, _errors(far), sets, names)
    assert judged.verdict == "confirmed"
    assert set(judged.found) == {"full", "lora"}
    near = {**far, **{(data, "lora", 100): 0.48 for data in sets}}
    assert rule.verdict(claim, 100, _errors(near), sets, names).verdict == "refuted"


def test_one_data_set_that_refutes_keeps_a_claim_from_being_confirmed(rule: ModuleType) -> None:
    sets = ("sst2", "ag_news")
    mixed = {("sst2", "scratch", 100): 0.7, ("ag_news", "scratch", 100): 0.11}
    judged = rule.verdict(rule.CLAIMS[0], 100, _errors(mixed), sets, ("scratch", "full"))
    assert judged.found["full"].low > 5
    assert judged.verdict == "inconclusive"


def test_a_growing_gap_is_the_difference_of_two_differences(rule: ModuleType) -> None:
    claim = next(claim for claim in rule.CLAIMS if claim.name == "2b")
    sets = ("sst2", "ag_news")
    gaps = {(data, "head_only", n): share for data in sets for n, share in ((100, 0.15), (4000, 0.3))}
    judged = rule.verdict(claim, 4000, _errors(gaps), sets, ("head_only", "full"))
    assert judged.found["full"].point == pytest.approx(15)
    assert judged.verdict == "confirmed"
    assert rule.verdict(claim, 4000, _errors({}), sets, ("head_only", "full")).verdict == "inconclusive"


def test_every_claim_stands_in_the_page_of_the_rule(rule: ModuleType, arms: ModuleType) -> None:
    page = (FOLDER.parent / "docs" / "decisions" / "0018-ulmfit-shape-rule.md").read_text(encoding="utf-8")
    page = page.partition("## What was found out since")[0]
    table = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    for claim in rule.CLAIMS:
        assert claim.text in table[claim.name]
        assert all(f"{margin:g}" in table[claim.name] for margin in claim.margins.values())
        assert claim.kind.split()[0] in table[claim.name]
        assert {claim.arm, claim.rival} <= {*arms.ARMS, rule.EVERY}
        assert all(claim.arm in arms.AT_MOST_ROWS for n in claim.margins if n == 4000)
    for name, arm in arms.ARMS.items():
        line = next(line for key, line in table.items() if key == f"`{name}`")
        written = [float(rate) for rate in line.split("|")[3].split(",")]
        assert tuple(written) == arm.rates


def test_courses_are_as_long_as_the_page_says_and_thaw_all(arms: ModuleType) -> None:
    assert {n: course.steps(n) for n, course in arms.COURSES.items()} == {100: 38, 1000: 63, 4000: 125}
    for n, course in arms.COURSES.items():
        for name, arm in arms.ARMS.items():
            spec = arms.train_spec(arm, n, course, arm.rates[0], 1)
            assert (spec.seed, spec.learning_rate) == (1, arm.rates[0])
            if arm.unfreeze:
                every = spec.unfreeze.every_steps
                assert every >= 1, name
                assert 7 * every <= 0.4 * course.steps(n), name  # the last of 8 depths


def _folder(place: Path) -> Path:
    (place / "sst2").mkdir()
    (place / "ag_news").mkdir()
    for name, start, count in (("train", 0, 4000), ("dev", 3900, 700), ("test", 4500, 1300)):
        lines = [f"text {at}\t{at % 2}\n" for at in range(start, start + count)] * 2
        (place / "sst2" / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    lines = [f'"{at % 4 + 1}","title {at % 6000}","a ""text"""\n' for at in range(7000)]
    (place / "ag_news" / "test.csv").write_text("".join(lines), encoding="utf-8")
    return place


@pytest.mark.parametrize("data", ["sst2", "ag_news"])
def test_no_text_is_in_two_parts_or_twice_in_one(rows: ModuleType, tmp_path: Path, data: str) -> None:
    pool, validation, test = rows.parts(data, _folder(tmp_path))
    assert (len(validation), len(test)) == (500, 1000)
    texts = [text for part in (pool, validation, test) for text, _ in part]
    assert len(texts) == len(set(texts))
    assert len(pool) > 3000
    assert {label for _, label in pool} == set(range(len(rows.LABELS[data])))


def test_a_smaller_draw_is_part_of_a_larger_one_and_seeds_differ(rows: ModuleType) -> None:
    found = rows.Rows(tuple(range(5000)), (), (), "")
    assert set(found.draw(100, 0)) < set(found.draw(1000, 0)) < set(found.draw(4000, 0))
    assert set(found.draw(100, 0)) != set(found.draw(100, 1))
