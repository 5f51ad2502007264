"""`peftkit sweep` as it is typed: what it prints, its JSON, and how it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from peftkit.cli import sweep
from peftkit.errors import ConfigError, RunError

pytest.importorskip("optuna")


@pytest.fixture
def arguments(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("registry", "runs", "cache"):
        monkeypatch.setenv(f"PEFTKIT_{name.upper()}", str(tmp_path / name))
    rows = [{"prompt": f"say {i}", "completion": str(7919 * i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "lora_sft", f"base={tiny_base}", f"data.train={tmp_path}/rows.jsonl", "held_out_share=0.25", "max_steps=1",
        "evaluate.max_generated_rows=0", "retention_passages=1", "learning_rate=1e-4..1e-2",
    ]  # fmt: skip


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(sweep.sweep)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_sweep_is_begun_gone_on_with_and_printed(arguments: list[str], tmp_path: Path) -> None:
    said = run(*arguments, "--trials", "1", "--name", "mine")
    for line in (
        "search: train.learning_rate: 0.0001 to 0.01, log-uniform",
        "pruning: off",
        "trial 0: as the recipe has it",
    ):
        assert line in said
    found = json.loads(run("--resume", "mine", "--trials", "2", "--json"))
    assert [trial["state"] for trial in found["trials"]] == ["done", "done"]
    assert found["command"].endswith("save_as=mine")
    assert "eval_steps" not in found["command"]
    kept = json.loads((tmp_path / "runs" / ".sweeps" / "mine" / "sweep.json").read_text())
    assert kept == found
    with pytest.raises(ConfigError, match=r"train\.max_steps: 1 then, not there now"):
        run(*(word for word in arguments if word != "max_steps=1"), "--resume", "mine")
    with pytest.raises(RunError, match="there is no sweep other"):
        run("--resume", "other")


def test_wrong_settings_cost_nothing(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*arguments, "r=0..4", "nothing=1")
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "runs").exists()
