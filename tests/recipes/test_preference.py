"""The preference recipes run whole on the tiny base, and leave behind exactly what they say (plumbing, no scores)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit import locations
from peftkit.errors import ConfigError
from peftkit.recipe import configure, execute, find, load
from peftkit.registry.store import Registry
from peftkit.runs import list_runs

pytestmark = pytest.mark.usefixtures("places")

SECRET = "zanzibar"  # stands in every row: where it turns up, a user's row has been kept


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path) -> list[str]:
    """Overrides for a run of two small steps on the tiny base."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{SECRET} {i}?", "chosen": f"it is {i}", "rejected": f"no {9 * i}"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"base={tiny_base}",
        f"data.train={path}",
        "data.held_out_share=0.25",
        "adapter.r=4",
        "train.max_steps=2",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.eval_steps=2",
        "evaluate.retention_passages=2",
    ]


@pytest.mark.parametrize(
    "name", ["dpo", pytest.param("orpo", marks=pytest.mark.full), pytest.param("kto", marks=pytest.mark.full)]
)
def test_a_recipe_runs_whole(name: str, settings: list[str]) -> None:
    recipe = load(find(name))
    result = execute(recipe, configure(recipe, overrides=settings))
    assert result.saved_as is not None
    manifest = Registry(locations.registry_root().path).resolve(name).manifest
    metrics: dict[str, Any] = json.loads(manifest.model_dump_json())["metrics"]
    assert result.figures["objective"]["name"] == "preference_accuracy"
    assert metrics["other"]["measured"] == {"pairs": 4}  # of kto too: its two rows of a pair are measured as one
    assert {"preference_accuracy", "margin", "answer_nll", "retention_nll"} <= metrics["after"].keys()
    assert "preference_accuracy" not in metrics["before"]
    assert metrics["other"]["training"]["answer_tokens"] == 8  # what a step counts: four pairs, or four answers
    assert SECRET not in manifest.model_dump_json()
    (run,) = list_runs(locations.runs_root().path)
    assert len(json.loads((run.path / "samples.json").read_text())) == 4


def test_a_loss_needs_its_kind_of_rows(settings: list[str]) -> None:
    recipe = load(find("dpo"))
    with pytest.raises(ConfigError, match=r"train\.loss=kto learns from labelled rows, and these are pairs"):
        execute(recipe, configure(recipe, overrides=[*settings, "train.loss=kto"]))
