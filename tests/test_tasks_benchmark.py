"""The benchmark of all tasks: its lines, its settings, and the rows that it rewrites; no recipe is run."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftkit.recipe.files import configure, find, load, shipped

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tasks")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    if "PEFTKIT_TEST_DATA" not in os.environ:
        pytest.skip("PEFTKIT_TEST_DATA is not set")
    return importlib.import_module("tasks_rows")


def _ends(point: float) -> dict[str, float]:
    return {"point": point, "low": point - 0.1, "high": point + 0.12344}


def test_a_line_has_the_best_baseline_and_the_paired_difference(tasks: ModuleType) -> None:
    after = {"macro_f1": _ends(0.8), "accuracy": _ends(0.9), "rows": 5, "metric": "macro_f1"}
    baselines = {"majority": {"macro_f1": _ends(0.2)}, "TF-IDF": {"macro_f1": None}}
    other: dict[str, Any] = {"metric": "macro_f1", "higher_is_better": True, "baselines": baselines}
    other |= {"best_baseline": "majority", "score_change": _ends(0.6)}
    line = tasks.scores({"before": {}, "after": after, "other": other})
    written = {"answer_nll_change": _ends(-1)}  # of a text: how it reads ranks it, and not how likely it is
    assert tasks.scores({"before": {}, "after": after, "other": other | written}) == line
    assert line == {
        "metric": "macro_f1",
        "score": {"point": 0.8, "low": 0.7, "high": 0.9234},
        "baselines": {"majority": {"point": 0.2, "low": 0.1, "high": 0.3234}, "TF-IDF": None},
        "best_baseline": "majority",
        "difference": {"point": 0.6, "low": 0.5, "high": 0.7234},
    }


def test_preferences_are_compared_with_chance_and_shown_beside_the_base(tasks: ModuleType) -> None:
    figures = {
        "before": {"likelihood_accuracy": _ends(0.7), "answer_nll": _ends(2)},
        "after": {"preference_accuracy": _ends(0.75), "answer_nll": _ends(2)},
        "other": {"answer_nll_change": _ends(0)},
    }
    line = tasks.scores(figures)
    assert line["metric"] == "preference_accuracy"
    assert line["difference"] == {"point": 0.25, "low": 0.15, "high": 0.3734}
    assert set(line["baselines"]) == {"chance", "likelier before"}


def test_answers_are_compared_with_the_base(tasks: ModuleType) -> None:
    other = {"answer_nll_change": _ends(-0.4), "metric": "exact_match"}
    line = tasks.scores({"before": {"answer_nll": _ends(2)}, "after": {"answer_nll": _ends(1.6)}, "other": other})
    assert (line["metric"], line["best_baseline"]) == ("answer_nll", "base")
    assert line["difference"]["point"] == -0.4


def test_every_arm_names_a_shipped_recipe_and_settings_that_it_takes(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = shipped()
    for name, arm in tasks.ARMS.items():
        assert arm.recipe in known, name
        resolved = configure(load(find(arm.recipe)), overrides=[f"base={arm.base}", *arm.settings])
        assert resolved.config.base.source == arm.base
        assert resolved.config.base.source.startswith("embedded:")  # a real model
    settings = [json.dumps(tasks.setting_of(name)) for name in tasks.ARMS]
    assert len(set(settings)) == len(settings)
    assert {"text_classification", "regression", "token_classification", "extractive_qa", "image_classification",
            "translation", "summarization", "dpo", "orpo", "kto", "distillation"} <= {
        arm.recipe for arm in tasks.ARMS.values()
    }  # fmt: skip


def test_no_passage_of_xquad_is_in_both_parts(rows: ModuleType, tmp_path: Path) -> None:
    files = [Path(setting.partition("=")[2]) for setting in rows.xquad(tmp_path)]
    found = [
        {
            paragraph["context"]
            for article in json.loads(file.read_text())["data"]
            for paragraph in article["paragraphs"]
        }
        for file in files
    ]
    assert len(found[0]) + len(found[1]) == len(found[0] | found[1]) == 240
    assert len(found[1]) == 50


def test_rows_that_are_rewritten_lose_the_words_of_their_prompts(rows: ModuleType, tmp_path: Path) -> None:
    for data, column, values in ((rows.stars, "stars", {1, 2, 3, 4, 5}), (rows.ag_news, "label", set(rows.CLASSES))):
        file = Path(data(tmp_path)[0].partition("=")[2])
        read = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert {row[column] for row in read} == values
        assert not any("I would like to give it" in row["text"][-40:] for row in read)
    lines = Path(rows.samsum(tmp_path)[0].partition("=")[2]).read_text(encoding="utf-8").splitlines()
    assert all(not json.loads(line)["text"].startswith("Summarize") for line in lines)
    assert not any(rows.ENDING in line for line in lines)
