"""`peftkit runs` and `peftkit report` as a user types them, on runs made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from peftkit.cli import main as command
from peftkit.cli.runs import report
from peftkit.runs import RunFolder

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(places: Path) -> list[RunFolder]:
    """A saved run and an interrupted one, and a living one."""
    made = [RunFolder.create(places / "runs", f"demo{n}", {"train": {"lr": 10.0**-n}}, {}) for n in (1, 2, 3)]
    for run, loss in zip(made, (2.0, 0.5, 1.0), strict=True):
        run.log_metrics(1, {"loss": 3.0})
        run.log_metrics(2, {"loss": loss})
        step = run.path / "checkpoints/step-00000002"
        step.mkdir(parents=True)
        (step / "state.safetensors").write_bytes(b"x" * 1_500_000)
    made[0].finish("done", saved_as="tickets@1", figures={"training": {"last_loss": 2.0}})
    made[1].finish("interrupted", error="stopped")
    return made


def reply(result: tuple[int, str, str]) -> Any:
    assert result[0] == 0, result[2]
    return json.loads(result[1])


def test_the_list_says_what_each_run_holds(cli: Cli, runs: list[RunFolder]) -> None:
    code, out, _ = cli("runs", "list")
    assert code == 0
    saved = next(line for line in out.splitlines() if runs[0].id in line)
    assert "1.5 MB" in saved
    assert "tickets@1" in saved
    rows = {row["id"]: row for row in reply(cli("runs", "list", "--json"))}
    assert [rows[run.id]["final_loss"] for run in runs] == [2.0, 0.5, 1.0]
    assert {row["checkpoint_bytes"] for row in rows.values()} == {1_500_000}
    assert all(row["bytes"] > 1_500_000 for row in rows.values())
    assert [rows[run.id]["state"] for run in runs] == ["done", "interrupted", "running"]


def test_show_and_a_prefix_of_several(cli: Cli, runs: list[RunFolder]) -> None:
    assert "steps 2" in cli("runs", "show", runs[1].id)[1]
    code, _, err = cli("runs", "show", "2")
    assert code == 1
    assert "3 runs begin with '2'" in err


def test_compare(cli: Cli, runs: list[RunFolder], places: Path) -> None:
    code, out, _ = cli("runs", "compare", runs[0].id, runs[1].id, "--html", "both.html")
    assert code == 0
    assert "train.lr" in out
    html = (places / "both.html").read_text()
    assert runs[0].id in html
    assert "train.lr" in html
    value = reply(cli("runs", "compare", runs[0].id, runs[1].id, "--json"))
    assert ["train.lr", [0.1, 0.01]] in value["settings"]
    code, _, err = cli("runs", "compare", runs[0].id, runs[0].id)
    assert (code, "two runs or more" in err) == (1, True)
    code, _, err = cli("runs", "compare", runs[0].id, runs[1].id, "--html", "none/both.html")
    assert (code, "cannot be written" in err) == (1, True)


def test_rm_says_what_it_freed_and_refuses_what_it_must(cli: Cli, runs: list[RunFolder]) -> None:
    code, out, _ = cli("runs", "rm", runs[0].id)
    assert code == 0
    assert out.startswith("removed 1 entry, 1.5 MB")
    for run, fact in ((runs[1], "only place of what it learned"), (runs[2], f"in process {os.getpid()}")):
        code, _, err = cli("runs", "rm", run.id)
        assert (code, fact in err) == (1, True)
        assert "to mend it" in err
        assert run.path.is_dir()
    assert reply(cli("runs", "rm", runs[1].id, "--force", "--json"))["bytes"] > 1_500_000
    assert cli("runs", "rm", runs[2].id, "--force")[0] == 1
    assert cli("runs", "rm", "..")[0] == 1


def test_gc(cli: Cli, runs: list[RunFolder]) -> None:
    planned = reply(cli("runs", "gc", "--dry-run", "--json"))
    assert (planned["bytes"], planned["dry_run"]) == (1_500_000, True)
    assert "would remove 1 entry, 1.5 MB" in cli("runs", "gc", "--dry-run")[1]
    assert reply(cli("runs", "gc", "--json"))["removed"] == planned["removed"]
    assert not (runs[0].path / "checkpoints").exists()
    assert (runs[1].path / "checkpoints").exists()
    assert "removed 0 entries" in cli("runs", "gc", "--older-than", "1")[1]
    assert cli("runs", "gc", "--older-than", "0")[0] == 2


def test_report(cli: Cli, runs: list[RunFolder], places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "report" not in {info.name for info in command.app.registered_commands}:
        own = typer.Typer()
        own.command("report")(report)
        own.callback()(lambda: None)
        monkeypatch.setattr(command, "app", own)
    code, out, _ = cli("report", runs[1].id)
    assert (code, out.strip()) == (0, str(runs[1].path / "report.html"))
    assert runs[1].id in (runs[1].path / "report.html").read_text()
    assert cli("report", runs[1].id, "--out", "page.html")[1].strip() == "page.html"
    assert "<!DOCTYPE html>" in (places / "page.html").read_text()
    assert cli("report", runs[1].id, "--out", "none/page.html")[0] == 1


def test_gc_takes_cached_trunks_when_asked(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    trunk = tmp_path / "cache" / "trunk" / ("0" * 32)
    trunk.mkdir(parents=True)
    (trunk / "states").write_bytes(bytes(2000))
    assert str(trunk) not in cli("runs", "gc")[1]
    assert f"{trunk}  2.0 kB" in cli("runs", "gc", "--trunks", "--dry-run")[1]
    assert trunk.exists()
    assert reply(cli("runs", "gc", "--trunks", "--json"))["bytes"] == 2000
    assert not trunk.exists()
