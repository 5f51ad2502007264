"""A manifest carries no folder of the machine that made it, whatever a recipe calls its settings."""

from __future__ import annotations

import json
from pathlib import Path

from peftkit.base.ref import LocatedBase
from peftkit.recipe.fields import without_paths
from peftkit.recipe.files import configure, find, load
from peftkit.recipe.groups import by_kind, groups


def test_no_folder_stands_in_a_manifest(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    base = LocatedBase(source=str(tmp_path / "base"), kind="folder", revision=None, folder=tmp_path)
    config = {
        "base": {"source": str(tmp_path / "base"), "revision": None},
        "examples": {"train": str(rows), "held_out": "~/mine/held.jsonl", "against": str(tmp_path / "gone.jsonl")},
        "evaluate": {"retention": str(rows), "instructions": "Answer shortly.", "shots": 3},
        "files": [str(rows), {"deep": str(rows)}],
        "init_from": "tickets@prod",
        "notes": "a/b is not a path here",
    }
    kept = without_paths(config, base)
    assert str(tmp_path) not in json.dumps(kept)
    assert kept["base"]["source"] == "base"
    assert kept["examples"] == {"train": "rows.jsonl", "held_out": "held.jsonl", "against": "gone.jsonl"}
    assert kept["evaluate"]["instructions"].startswith("sha256:")
    assert kept["evaluate"]["shots"] == 3
    assert kept["files"] == ["rows.jsonl", {"deep": "rows.jsonl"}]
    assert (kept["init_from"], kept["notes"]) == (config["init_from"], config["notes"])
    assert config["examples"]["train"] == str(rows), "what was given is not changed"


def test_a_hub_id_is_not_a_path(tmp_path: Path) -> None:
    base = LocatedBase(source="Qwen/Qwen3-4B", kind="hub", revision="a" * 40, folder=tmp_path)
    config = {"base": {"source": "Qwen/Qwen3-4B", "revision": None}, "data": {"train": "owner/name:train"}}
    assert without_paths(config, base) == config


def test_groups_are_found_by_their_kind(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    text = find("qlora_sft").read_text()
    mine.write_text(text.replace("train: TrainSpec", "sft: TrainSpec").replace("cfg.train", "cfg.sft"))
    config = configure(load(mine), overrides=["sft.learning_rate=0.5"]).config
    assert groups(config).names["train"] == "sft"
    assert by_kind(config)["train"]["learning_rate"] == 0.5
    assert "sft" not in by_kind(config)
