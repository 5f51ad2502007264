"""Plans against memory that others measured and published."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = json.loads((BENCHMARKS / "published_memory.json").read_text())
FITTED = "fitcheck"  # gave the size of CUDA's context


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_published", BENCHMARKS / "plan_published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plan_published", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_nine_of_ten_scored_rows_are_within_a_tenth(bench: ModuleType) -> None:
    _, total = bench.score()
    assert total["scored"] == sum(row["scored"] for row in TABLE["rows"]) == 73
    assert total["share"] >= 0.9


def test_the_committed_result_is_that_of_this_code(bench: ModuleType) -> None:
    committed = json.loads((BENCHMARKS / "results" / "plan_published.json").read_text())
    lines, total = bench.score()
    assert committed["summary"] == total
    assert committed["rows"] == lines


def test_every_row_that_is_not_scored_says_why() -> None:
    assert len(TABLE["rows"]) == len({row["id"] for row in TABLE["rows"]}) == 158
    assert all(row["scored"] or row["why_not"] for row in TABLE["rows"])


def test_no_constant_is_fitted_to_a_row_that_is_scored() -> None:
    assert not any(row["scored"] for row in TABLE["rows"] if row["source"] == FITTED)


def test_a_wrong_plan_would_be_noticed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench.held
    monkeypatch.setattr(bench, "held", lambda base, setting: 2 * honest(base, setting))
    _, total = bench.score()
    assert total["share"] < 0.5
