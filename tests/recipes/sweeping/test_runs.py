"""Sweeps of real runs on tiny bases: folders, pruning, failures, kill -9, two processes, and the best trained again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_bases import write_base

from peftkit import locations
from peftkit.errors import TrainingError
from peftkit.events import Event, silent
from peftkit.recipe import configure, execute, find, load
from peftkit.recipe.sweeping import Sweep, started, sweep, sweeps_folder
from peftkit.recipe.sweeping.book import read_trials
from peftkit.registry.store import Registry
from peftkit.runs import list_runs

pytestmark = [pytest.mark.usefixtures("places")]
pytest.importorskip("optuna")

CODE = (
    "import sys; from pathlib import Path; from peftkit.recipe.sweeping import sweep\n"
    "sweep(Path(sys.argv[1]), trials=int(sys.argv[2]))"
)


@pytest.fixture
def settings(tiny_base: Path, short_rows: Path) -> list[str]:
    return [
        f"base={tiny_base}", f"data.train={short_rows}", "data.held_out_share=0.25", "max_steps=4", "r=4",
        "train.per_device_train_batch_size=4", "evaluate.max_generated_rows=0", "retention_passages=1",
    ]  # fmt: skip


def begin(settings: list[str], *searched: str, name: str = "mine", **asked: object) -> Path:
    return started(sweeps_folder(locations.runs_root().path), name, "lora_sft", [*settings, *searched], **asked)


def go(folder: Path, trials: int, **options: object) -> Sweep:
    return sweep(folder, trials=trials, **{"report": silent, **options})  # type: ignore[arg-type]


def value(found: Sweep, index: int) -> float:
    (trial,) = [trial for trial in found.trials if trial.index == index]
    assert trial.objective is not None
    return trial.objective.value


def test_trials_are_runs_in_a_folder_of_their_own(settings: list[str], tmp_path: Path) -> None:
    folder = begin(settings, "learning_rate=1e-4,1e-2")
    done = go(folder, 2)
    assert {trial.state for trial in done.trials} == {"done"}
    runs = list_runs(folder / "runs")
    assert sorted(run.recipe for run in runs) == ["sweep-mine-000", "sweep-mine-001"]
    assert {run.id for run in runs} == {trial.run for trial in done.trials}
    assert list_runs(locations.runs_root().path) == [], "not among the user's own"
    assert not (tmp_path / "registry").exists()
    assert done.best is not None
    assert [path.name for path in (folder / "registry").iterdir()] == [f"sweep-mine-{done.best.index:03d}"]
    assert not any(list(run.path.glob("checkpoints")) for run in runs)
    interval = {run.id: run.figures["evaluation"]["after"]["answer_nll"] for run in runs}
    for trial in done.trials:
        assert trial.objective is not None
        assert trial.run is not None
        assert interval[trial.run] == {
            "point": trial.objective.value,
            "low": trial.objective.low,
            "high": trial.objective.high,
        }


@pytest.mark.full
def test_the_printed_command_trains_the_best_again(settings: list[str]) -> None:
    found = go(begin(settings, "learning_rate=1e-4..1e-1", "lora_alpha=4,8"), 4)
    assert found.best is not None
    assert found.command is not None
    words = shlex.split(found.command)
    assert words[:3] == ["peftkit", "train", "lora_sft"]
    recipe = load(find(words[2]))
    result = execute(recipe, configure(recipe, overrides=words[3:]))
    assert result.figures["evaluation"]["after"]["answer_nll"]["point"] == value(found, found.best.index)
    (scratch,) = (found.folder / "registry").iterdir()
    (name,) = Registry(scratch).names()
    kept, again = Registry(scratch).resolve(name), Registry(locations.registry_root().path).resolve("mine")
    assert kept.manifest.files == again.manifest.files, "byte for byte"


@pytest.mark.full
def test_a_planted_bad_rate_is_stopped_and_the_others_are_not(settings: list[str]) -> None:
    """Seed 0 draws the rate of 1,000 sixth; the first four are never stopped."""
    folder = begin(settings, "learning_rate=1e-5,1e-4,1e-3,1e-2,3e-3,1e3", "eval_steps=1", seed=0)
    found = go(folder, 7)
    states = {trial.settings.get("train.learning_rate"): trial for trial in found.trials}
    assert len(states) == 7, "the recipe's own, and each of six"
    bad = states["1e3"]
    assert bad.index == 5
    assert bad.state == "pruned", bad
    assert max(bad.measured) < 4, "before its last step"
    assert found.best is not None
    assert [trial.state for trial in sorted(found.trials, key=lambda each: each.index)[:4]] == ["done"] * 4
    assert found.best.settings["train.learning_rate"] == "3e-3"
    (run,) = [run for run in list_runs(folder / "runs") if run.recipe == f"sweep-mine-{bad.index:03d}"]
    assert run.state == "interrupted"
    assert run.error is not None
    assert run.error.startswith("pruned after step")
    assert not (run.path / "checkpoints").exists()


@pytest.mark.full
def test_a_base_that_cannot_be_loaded_fails_alone(settings: list[str], tmp_path: Path) -> None:
    other, broken = write_base(tmp_path / "other", seed=1), tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    bases = ",".join(map(str, (settings[0].removeprefix("base="), other, broken)))
    found = go(begin(settings[1:], f"bases={bases}"), 3)
    states = {Path(trial.settings["base.source"]).name: trial.state for trial in found.trials}
    assert states == {"tiny": "done", "other": "done", "broken": "failed"}
    assert any("tokenizers" in warning for warning in found.warnings)


@pytest.mark.full
def test_when_no_trial_gives_a_figure_the_sweep_fails(settings: list[str]) -> None:
    folder = begin([*settings[:1], "data.train=nowhere.jsonl", *settings[2:]], "learning_rate=1e-4..1e-2")
    with pytest.raises(TrainingError, match=r"none of 3 trials of the sweep mine gave a figure; the first: .*nowhere"):
        go(folder, 9)


def process(folder: Path, trials: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CODE, str(folder), str(trials)], env={**os.environ})


@pytest.mark.full
def test_killed_in_the_middle_of_a_run_it_goes_on_to_the_same_end(settings: list[str]) -> None:
    searched = ["learning_rate=1e-4..1e-1", "lora_alpha=4..16"]
    whole = go(begin(settings, *searched, name="whole"), 4)
    folder = begin(settings, *searched, name="killed")
    running = process(folder, 4)
    until = time.monotonic() + 120
    while not list((folder / "runs").glob("*sweep-killed-002*/metrics.jsonl")):
        assert time.monotonic() < until
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert [trial.index for trial in read_trials(folder)] == [0, 1]
    found = go(folder, 4)
    assert len(list_runs(folder / "runs")) == 5
    assert [trial.settings for trial in found.trials] == [trial.settings for trial in whole.trials]
    assert [trial.objective for trial in found.trials] == [trial.objective for trial in whole.trials]


@pytest.mark.full
def test_two_jobs_share_a_sweep(settings: list[str]) -> None:
    folder = begin(settings, "learning_rate=1e-4..1e-1")
    said: list[Event] = []
    found = go(folder, 6, jobs=2, report=said.append)
    assert sorted(trial.index for trial in found.trials) == list(range(6))
    assert {trial.state for trial in found.trials} == {"done"}
    assert len({trial.settings.get("train.learning_rate") for trial in found.trials}) == 6
    kept = json.loads((folder / "sweep.json").read_text())
    assert len(kept["trials"]) == 6
    assert {trial["state"] for trial in kept["trials"]} == {"done"}
