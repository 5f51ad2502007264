"""The default learning rate of every method is the one that was measured (benchmarks/methods_sweep.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.tuning.methods import METHODS

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "methods_sweep.json"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The results of the sweep; skipped, and counted, until there are some."""
    if not FILE.exists():
        pytest.skip("benchmarks/methods_sweep.py has not been run yet")
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def test_every_method_was_measured_or_says_why_not(measured: dict[str, Any]) -> None:
    assert sorted([*measured["methods"], *measured["not_measured"]]) == sorted(METHODS)
    assert set(measured["not_measured"]) == {"bias_only"}


def test_default_rates_are_the_measured_ones(measured: dict[str, Any]) -> None:
    rates = {name: METHODS[name].learning_rate for name in measured["methods"]}
    assert rates == {name: found["learning_rate"] for name, found in measured["methods"].items()}


def test_each_rate_is_one_of_three_or_more_and_not_above_the_best(measured: dict[str, Any]) -> None:
    for name, found in measured["methods"].items():
        tried = {float(rate): nll for rate, nll in found["validation_nll"].items() if nll is not None}
        assert len(found["validation_nll"]) >= 3, name
        assert tried[found["best"]] == min(tried.values()), name
        assert found["learning_rate"] in tried, name
        assert found["learning_rate"] <= found["best"], name


def test_what_was_measured_trains_over_those_bits(measured: dict[str, Any]) -> None:
    for name, found in measured["methods"].items():
        assert found["bits"] in METHODS[name].bits, name
        assert (found["bits"] == 4) == (4 in METHODS[name].bits), name
