"""`peftkit few-shot` as it is typed: the table, and the JSON that the folder keeps too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from peftkit.cli import few_shot

pytest.importorskip("scipy")


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(few_shot.few_shot)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_two_draws_of_four_rows(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("registry", "runs", "cache"):
        monkeypatch.setenv(f"PEFTKIT_{name.upper()}", str(tmp_path / name))
    rows = [{"prompt": f"say {i}", "completion": str(7919 * i)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "lora_sft", f"base={tiny_base}", f"data.train={tmp_path}/rows.jsonl", "held_out_share=0.25", "max_steps=1",
        "evaluate.max_generated_rows=0", "retention_passages=1", "n=4", "--draws", "2",
    ]  # fmt: skip
    said = run(*arguments)
    assert "mean over draws" in said
    assert "The interval over draws says" in said
    found = json.loads(run(*arguments, "--json"))
    (folder,) = (tmp_path / "runs" / ".few-shot").iterdir()
    assert json.loads((folder / "few-shot.json").read_text()) == found
    (point,) = found["points"]
    assert (point["rows"], point["draws"], point["failed"]) == (4, 2, 0)
    assert point["low"] < point["mean"] < point["high"]
    assert len(list((folder / "runs").iterdir())) == 2, "the second time they were found"
