"""The benches' search for a rate, and their memory of what was measured."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "lab.py"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lab", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lab", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("start", "lowest", "beyond", "tried", "edge"),
    [
        (1e-3, 1e-3, 4, [3e-4, 1e-3, 3e-3], False),  # inside at once
        (1.1e-3, 3e-3, 4, [3e-4, 1e-3, 3e-3, 1e-2], False),  # at the upper edge: one more
        (1e-3, 1e-5, 4, [3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], False),
        (1e-3, 1e-5, 2, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], True),  # not found within two more
        (1e-3, 1e-1, -1, [1e-3], True),
    ],
)
def test_the_best_rate_lies_between_worse_ones(
    lab: ModuleType, start: float, lowest: float, beyond: int, tried: list[float], edge: bool
) -> None:
    asked: list[float] = []

    def score(rate: float) -> float:
        asked.append(rate)
        return abs(math.log(rate / lowest))

    rate, scores, at_edge = lab.best_rate(start, score, beyond=beyond)
    assert (list(scores), at_edge) == (tried, edge)
    assert sorted(asked) == tried  # none twice
    assert rate == min(tried, key=lambda one: abs(math.log(one / lowest)))


def test_the_search_begins_again_where_it_ended(lab: ModuleType) -> None:
    def curve(rate: float) -> float:
        return abs(math.log(rate / 3e-5))

    rate, scores, _ = lab.best_rate(2e-4, curve, beyond=4)
    again, fewer, _ = lab.best_rate(rate, curve, beyond=4)
    assert again == rate == 3e-5
    assert set(fewer) <= set(scores)


def test_a_rate_at_which_training_diverges_is_never_the_best(lab: ModuleType) -> None:
    rate, scores, edge = lab.best_rate(1e-3, lambda rate: math.inf if rate > 5e-4 else 1.0, beyond=0)
    assert (rate, edge) == (3e-4, True)
    assert [math.isinf(score) for score in scores.values()] == [False, True, True]


class Counting:
    """A lab whose runs are counted instead of made."""

    def __init__(self, module: ModuleType, file: Path, minutes: float | None = None) -> None:
        self.runs: list[str] = []
        self.lab = module.Lab(file, dict, minutes)
        self.lab._measured = self._measured

    def _measured(self, what: str, setting: dict[str, Any]) -> dict[str, Any]:
        self.runs.append(what)
        return {"nll": len(self.runs)}


def test_what_stands_in_the_file_is_not_run_again(lab: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    first = Counting(lab, file)
    assert [first.lab.run(what, {"rate": rate}) for what, rate in (("a", 1), ("b", 2))] == [{"nll": 1}, {"nll": 2}]
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"what": "c", "setting": {"ra')  # killed while it wrote
    second = Counting(lab, file)
    assert second.lab.run("named otherwise", {"rate": 2}) == {"nll": 2}
    assert second.lab.run("c", {"rate": 3}) == {"nll": 1}
    assert second.runs == ["c"]
    assert file.read_bytes().startswith(whole)
    assert [line["what"] for line in Counting(lab, file).lab.lines()] == ["a", "b", "c"]
    assert all(line["environment"]["torch"] for line in second.lab.lines())


def test_no_run_begins_that_would_end_after_the_minutes(lab: ModuleType, tmp_path: Path) -> None:
    limited = lab.Lab(tmp_path / "results.jsonl", dict, 1)
    limited.longest = 61.0
    with pytest.raises(lab.OutOfTime, match="the next one"):
        limited.run("the next one", {"rate": 1})
    assert not (tmp_path / "results.jsonl").exists()
