"""Figures of few-shot runs summed up: Student's interval by hand, baselines, failed draws; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from peftkit.errors import ConfigError
from peftkit.events import Table
from peftkit.recipe.few_shot.curve import Draw, keep, summed_up
from peftkit.recipe.few_shot.draws import read_few_shot
from peftkit.recipe.sweeping.trial import Objective

pytest.importorskip("scipy")


def draw(rows: int, number: int, value: float, **more: object) -> Draw:
    return Draw(rows, number, f"run-{number}", "d", Objective("f1", value, "max", value - 1, value + 1), **more)  # type: ignore[arg-type]


def test_the_interval_over_draws_by_hand() -> None:
    """1 … 5: s = √2.5 and t(0.975, 4) = 2.7764 (any table) give 3 ± 1.9633."""
    point = summed_up(8, [draw(8, i, float(i)) for i in (4, 1, 5, 2, 3)])
    assert point.mean == 3
    assert point.deviation == pytest.approx(math.sqrt(2.5))
    assert point.high == pytest.approx(3 + 1.96325, abs=1e-4)
    assert point.low == pytest.approx(3 - 1.96325, abs=1e-4)
    assert point.middle == Objective("f1", 3.0, "max", 2.0, 4.0)


def test_the_interval_holds_what_it_promises() -> None:
    """Draws from a normal distribution: 95 % of 4,000 intervals over three draws hold its mean, ± 4 standard errors."""
    import numpy as np

    random = np.random.default_rng(0)
    points = [summed_up(8, [draw(8, i, float(v)) for i, v in enumerate(random.normal(size=3))]) for _ in range(4000)]
    hit = sum(point.low < 0 < point.high for point in points if point.low is not None and point.high is not None)
    assert abs(hit / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_draw_has_no_interval_and_a_failed_one_is_counted() -> None:
    point = summed_up(8, [draw(8, 0, 2.0), Draw(8, 1, reason="one class")])
    assert (point.draws, point.failed, point.mean, point.low, point.deviation) == (1, 1, 2.0, None, None)
    assert summed_up(8, [Draw(8, 0, reason="one class")]).mean is None


def test_the_figures_of_a_run() -> None:
    """As SFT and as the tasks keep them: the base before, or trivial baselines from the same training rows."""
    nll = {"evaluation": {"before": {"answer_nll": {"point": 5.0, "low": 4, "high": 6}}, "after": {}, "other": {}}}
    found = Draw.of(8, 0, "run", "d", Objective("answer_nll", 1.0, "min"), nll)
    assert (found.before, found.baselines) == (5.0, {})
    rivals = {"majority": {"f1": {"point": 0.2, "low": 0.1, "high": 0.3}, "n": 9}, "prompted": {"n": 3}}
    task = {"evaluation": {"before": rivals["majority"], "after": {}, "other": {"baselines": rivals}}}
    found = Draw.of(8, 0, "run", "d", Objective("f1", 1.0, "max"), task)
    assert (found.before, found.baselines) == (None, {"majority": 0.2})


def test_what_is_kept(tmp_path: Path) -> None:
    draws = [draw(n, i, n + i / 10, baselines={"majority": 0.1 * i}) for n in (16, 8) for i in range(3)]
    curve = keep(tmp_path, "mine", ["a.b=1"], [*draws, Draw(8, 3, reason="<one> class")])
    kept = json.loads((tmp_path / "few-shot.json").read_text())
    assert [point["rows"] for point in kept["points"]] == [8, 16]
    assert kept["points"][1]["baselines"] == {"majority": pytest.approx(0.1)}
    assert len(kept["draws"]) == 7
    page = (tmp_path / "few-shot.html").read_text()
    assert page.count("<circle") == 2 + 6 + 2
    assert "&lt;one&gt; class" in page
    said: list[object] = []
    curve.tell(said.append)
    (table,) = [event for event in said if isinstance(event, Table)]
    assert table.columns == (
        "n",
        "draws",
        "mean over draws",
        "deviation",
        "middle draw, over rows",
        "majority",
        "left out",
    )
    assert [row[0] for row in table.rows] == [8, 16]
    assert [row[-1] for row in table.rows] == ["1 failed", ""]


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_few_shot("lora_sft", ["n=8,x,8", "r=4,8", "data.draw=1", "nothing=1"], metric="score")
    starts = ["nothing: unknown", "adapter.r: 4, 8: only n", "data.draw: few-shot runs set it", "n: 'x' is no number",
              "n: 8 stands twice", "metric 'score'"]  # fmt: skip
    found = caught.value.problems
    assert [[start for start in starts if problem.startswith(start)] for problem in found] == [[s] for s in starts]
    with pytest.raises(ConfigError, match="give the numbers of training rows once"):
        read_few_shot("lora_sft", ["r=4"])


def test_the_same_command_has_the_same_folder_and_other_rows_do_not_change_it() -> None:
    def name(*arguments: str) -> str:
        return read_few_shot("lora_sft", list(arguments)).name

    assert name("n=8", "r=4") == name("r=4", "n=16,32")
    assert name("n=8", "r=4") != name("n=8", "r=8")
