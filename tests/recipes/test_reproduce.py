"""A registered adapter can be built again, byte for byte, from what its manifest says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peftkit import locations
from peftkit.backbone import measured
from peftkit.backbone.measured import Timing
from peftkit.cli.main import main
from peftkit.errors import RunError
from peftkit.events import Event, Warned
from peftkit.recipe import configure, execute, find, load, shipped
from peftkit.recipe.reproduce import Reproduction, reproduce
from peftkit.registry.store import Registry, Version
from peftkit.tuning.methods import METHODS

Train = Callable[..., Version]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "mine" / "lamps.jsonl"
    path.parent.mkdir()
    lines = [{"prompt": f"case {i}", "completion": f"lamp {i * 7 % 5}"} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    for name in ("registry", "runs", "cache"):
        monkeypatch.setenv(f"PEFTKIT_{name.upper()}", str(tmp_path / name))

    def train(*more: str) -> Version:
        settings = ["train.max_steps=2", "evaluate.max_generated_rows=0", "evaluate.retention=null", "save_as=lamps"]
        recipe = load(find("qlora_sft"))
        resolved = configure(recipe, overrides=[f"base={tiny_base}", f"data.train={rows}", *settings, *more])
        done = execute(recipe, resolved)
        return Registry(locations.registry_root().path).resolve(str(done.saved_as))

    return train


def again(version: Version, *overrides: str, report: Callable[[Event], None] = lambda event: None) -> Reproduction:
    registry, runs = locations.registry_root().path, locations.runs_root().path
    recipe = load(shipped()["qlora_sft"])
    return reproduce(version, recipe, registry, runs=runs, overrides=overrides, report=report)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_bytes_come_out_and_nothing_else_changes(train: Train, tmp_path: Path) -> None:
    version = train()
    before = everything(tmp_path / "registry") | everything(tmp_path / "runs")
    found = again(version)
    assert found.same
    assert len(found.files) == 2
    assert found.environment == {}
    assert everything(tmp_path / "registry") | everything(tmp_path / "runs") == before


def test_another_seed_gives_other_bytes(train: Train) -> None:
    found = again(train(), "adapter.seed=5")
    assert not found.same
    assert found.files["adapter_config.json"][0] == found.files["adapter_config.json"][1]


def test_without_the_run_the_rows_must_be_named_and_the_base_is_found_by_content(
    train: Train, rows: Path, tmp_path: Path
) -> None:
    version = train()
    assert str(tmp_path) not in (version.path / "manifest.json").read_text(), "no path of this machine travels"
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(RunError, match=r"data\.train=lamps\.jsonl is not here") as caught:
        again(version)
    assert "peftkit reproduce lamps data.train=" in str(caught.value)
    assert again(version, f"data.train={rows}").same


@pytest.mark.parametrize("run_kept", [True, False])
def test_a_measured_dtype_is_the_one_that_was_found(
    train: Train, rows: Path, run_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bfloat16 in (0.4, 2.0):  # seconds, against 1.0 in float32: the second time it would be float32
        monkeypatch.setattr(measured, "_once", lambda block, threads, s=bfloat16: Timing(1.0, s, block, 512, 9))
        if bfloat16 < 1:
            version = train("quant.device=cpu", "quant.compute_dtype=measured")
    if not run_kept:
        shutil.rmtree(locations.runs_root().path)
    found = again(version, *([] if run_kept else [f"data.train={rows}"]))
    assert found.same


def test_other_rows_are_refused_before_anything_is_trained(train: Train, rows: Path) -> None:
    version = train()
    rows.write_text(rows.read_text().replace("lamp 0", "lamp 9", 1))
    with pytest.raises(RunError, match=r"has the SHA-256"):
        again(version)


def test_a_continued_adapter_starts_from_its_parent_whatever_latest_is_now(train: Train) -> None:
    first = train("adapter.r=4")
    second = train("init_from=lamps", "train.seed=3")
    assert second.manifest.parents[0].version == first.id
    assert again(second).same


def test_the_rate_is_the_one_that_was_used_whatever_the_methods_default_is_now(
    train: Train, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    version = train()
    row = METHODS["lora"]
    assert version.manifest.recipe is not None
    assert version.manifest.recipe.config["train"]["learning_rate"] is None
    assert version.manifest.metrics.other["training"]["learning_rate"] == row.learning_rate
    capfd.readouterr()
    assert main(["show", "lamps"]) == 0
    assert re.search(rf"learning rate +{row.learning_rate:g}\n", capfd.readouterr().out)
    monkeypatch.setitem(METHODS, "lora", replace(row, learning_rate=0.1))
    assert again(version).same
    shutil.rmtree(tmp_path / "runs")
    assert again(version, f"data.train={rows}").same


def test_another_machine_is_named(train: Train) -> None:
    version = train()
    fields = version.manifest.model_copy(update={"environment": {**version.manifest.environment, "torch": "1.0"}})
    said: list[Event] = []
    found = again(Version(version.name, version.id, version.path, fields), report=said.append)
    assert found.environment["torch"][0] == "1.0"
    assert any(isinstance(event, Warned) and "torch was 1.0" in event.text for event in said)


def test_the_command_ends_with_1_when_the_bytes_differ(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    train()
    capfd.readouterr()
    assert main(["reproduce", "lamps", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["same"] is True
    assert main(["reproduce", "lamps", "train.learning_rate=0.1"]) == 1
    assert "was not reproduced" in capfd.readouterr().err
    assert main(["reproduce", "nobody"]) == 1


def test_a_file_name_in_another_encoding_does_not_cost_the_training(train: Train, rows: Path) -> None:
    latin = Path(shutil.copy(rows, rows.with_name(b"stra\xdfe.jsonl".decode("utf-8", "surrogateescape"))))
    version = train(f"data.train={latin}")
    assert version.manifest.data[0].source == "stra\\udcdfe.jsonl"
