"""`--resume` as a user meets it: killed, interrupted, changed, twice at once; and the adapter of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit import locations
from peftkit.backbone import measured
from peftkit.backbone.measured import Timing
from peftkit.errors import RunError
from peftkit.events import Event, Phase, Progress, Warned
from peftkit.recipe import Interrupted, Result, configure, execute, find, load, recipe_and_settings
from peftkit.registry.store import Registry
from peftkit.runs import RunFolder, RunStatus, list_runs, read_metrics
from peftkit.tuning import inject

pytestmark = pytest.mark.usefixtures("places")

Report = Callable[[Event], None]


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture
def rows(short_rows: Path) -> Path:
    """What is trained on."""
    return short_rows


@pytest.fixture
def settings(tiny_base: Path, rows: Path) -> list[str]:
    """Six steps with dropout, measured in between."""
    return [
        f"base={tiny_base}", f"data.train={rows}", "data.held_out_share=0.25", "adapter.r=4",
        "adapter.lora_dropout=0.1", "train.num_train_epochs=2", "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.eval_steps=2", "train.learning_rate=1e-2", "evaluate.max_generated_rows=2", "evaluate.max_new_tokens=3",
        "evaluate.retention_passages=1", "save_as=tickets",
    ]  # fmt: skip


def runs() -> Path:
    return locations.runs_root().path


def start(settings: list[str], report: Report = lambda event: None) -> Result:
    recipe = load(find("qlora_sft"))
    return execute(recipe, configure(recipe, overrides=settings), report=report)


def resume(run: str = "", *overrides: str, report: Report = lambda event: None, **options: Any) -> Result:
    status, recipe, resolved = recipe_and_settings(runs(), run or last().id, overrides=overrides)
    return execute(recipe, resolved, resume=status, report=report, **options)


def last() -> RunStatus:
    return list_runs(runs())[0]


def at(step: int, error: BaseException) -> Report:
    """A report that ends the process in the middle of a step."""

    def report(event: Event) -> None:
        if isinstance(event, Progress) and "loss" in event.figures and event.done == step:
            raise error

    return report


def adapter_bytes(reference: str = "tickets") -> bytes:
    return (Registry(locations.registry_root().path).resolve(reference).path / "adapter_model.safetensors").read_bytes()


def losses(run: RunStatus) -> list[tuple[int, float]]:
    return [(step, figures["loss"]) for step, figures in read_metrics(run.path) if "loss" in figures]


def test_a_resumed_run_is_the_undisturbed_one(settings: list[str], tmp_path: Path) -> None:
    start([*settings, "save_as=whole"])
    whole = last()
    with pytest.raises(Interrupted, match="interrupted in the middle of a step") as caught:
        start(settings, at(4, KeyboardInterrupt()))
    assert f"peftkit train --resume {last().id}" in str(caught.value)
    assert last().state == "interrupted"
    result = resume()
    assert result.run_id == last().id
    assert last().state == "done"
    assert last().saved_as == result.saved_as
    assert adapter_bytes("tickets") == adapter_bytes("whole")
    assert losses(last()) == losses(whole)
    assert len(losses(last())) == 6
    config = json.loads(json.dumps(configure(load(find("qlora_sft")), overrides=settings).as_dict()))
    assert configure(load(find("qlora_sft")), files=[last().path / "config.yaml"]).as_dict() == config


def test_a_run_that_died_while_it_was_measured_trains_nothing_again(settings: list[str]) -> None:
    def die(event: Event) -> None:
        if isinstance(event, Phase) and event.name.startswith("measure"):
            raise Killed

    with pytest.raises(Killed):
        start(settings, die)
    trained = losses(last())
    said: list[Event] = []
    result = resume(report=said.append)
    assert result.saved_as is not None
    assert losses(last()) == trained
    assert not any(isinstance(event, Progress) and "loss" in event.figures for event in said)


@pytest.mark.parametrize("faster", [True, False])
def test_a_measured_dtype_is_kept_and_not_measured_again(
    settings: list[str], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may measure otherwise the second time; the run is still the one that began."""
    asked = 0

    def once(block: Any, threads: int) -> Timing:
        nonlocal asked
        asked += 1
        first = asked == 1
        return Timing(1.0, 0.4 if first == faster else 2.0, block, 512, 9)

    monkeypatch.setattr(measured, "_once", once)
    settings = [*settings, "quant.device=cpu", "quant.compute_dtype=measured"]
    with pytest.raises(Interrupted):
        start(settings, at(4, KeyboardInterrupt()))
    result = resume()
    assert asked == 1
    manifest = Registry(locations.registry_root().path).resolve(str(result.saved_as)).manifest
    assert manifest.base.quantization is not None
    assert manifest.base.quantization["compute_dtype"] == ("bfloat16" if faster else "float32")
    plan = json.loads((last().path / "plan.json").read_text())
    assert plan["setting"]["compute_dtype"] == "float32"
    assert "planned in float32" in plan["assumed"][0]


CHANGES = {
    "train.learning_rate=0.5": "settings, train.learning_rate: 0.01 → 0.5",
    "adapter.r=8": "settings, adapter.r: 4 → 8",
    "train.gradient_accumulation_steps=1": "settings, train.gradient_accumulation_steps: 2 → 1",
    "quant.double_quant=false": "settings, quant.double_quant: True → False",
    "data.max_length=64": "settings, data.max_length: None → 64",
}


def test_changed_settings_are_refused_by_name(settings: list[str]) -> None:
    with pytest.raises(Interrupted):
        start(settings, at(4, KeyboardInterrupt()))
    for change, named in CHANGES.items():
        with pytest.raises(RunError, match="would not be the same run") as caught:
            resume("", change)
        assert named in str(caught.value)
        assert str(caught.value).count("\n- ") == 1, "nothing else is said to differ"
    assert (last().state, last().saved_as) == ("interrupted", None), "a refusal changes nothing"
    assert resume().saved_as is not None
    done = last()
    with pytest.raises(RunError, match="would not be the same run"):
        resume("", "train.learning_rate=0.5")
    assert (last().state, last().saved_as, last().figures) == (done.state, done.saved_as, done.figures)


def test_changed_rows_are_refused(settings: list[str], rows: Path) -> None:
    with pytest.raises(Interrupted):
        start(settings, at(4, KeyboardInterrupt()))
    before = rows.read_text()
    rows.write_text(before.replace("say", "Say", 1))
    with pytest.raises(RunError, match="data, SHA-256 of"):
        resume()
    lines = before.splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match="data, training sequences: 12 → "):
        resume()
    rows.write_text(before)
    wrong = rows.with_name("wrong.jsonl")
    wrong.write_text(before.replace("say", "Say"))
    with pytest.raises(RunError, match="data, SHA-256 of"):
        resume("", f"data.train={wrong}")
    assert str(rows) in (last().path / "config.yaml").read_text(), "what was refused is not kept"
    moved = rows.with_name("elsewhere.jsonl")
    moved.write_text(before)
    rows.unlink()
    assert resume("", f"data.train={moved}").saved_as is not None, "the same rows may lie elsewhere"


@pytest.mark.full
def test_a_changed_base_is_refused(settings: list[str], tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        start(settings, at(4, KeyboardInterrupt()))
    other = shutil.copytree(tiny_base, tmp_path / "other")
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match="base, weights by content: "):
        resume("", f"base={other}")


@pytest.mark.full
def test_changed_versions_and_recipes_are_refused(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        start(settings, at(4, KeyboardInterrupt()))
    copy = tmp_path / "qlora_sft.py"
    copy.write_text(find("qlora_sft").read_text() + "\n# edited\n")
    status, recipe, resolved = recipe_and_settings(runs(), last().id, recipe=copy)
    with pytest.raises(RunError, match="recipe, SHA-256: "):
        execute(recipe, resolved, resume=status)
    for state in last().path.glob("checkpoints/step-*/state.json"):  # as another torch would have written it
        state.chmod(0o644)
        bound = json.loads(state.read_text())
        bound["bound_to"]["versions"]["torch"] = "1.0.0"
        state.write_text(json.dumps(bound) + "\n")
        head = state.with_name("checkpoint.json")
        head.chmod(0o644)
        files = json.loads(head.read_text())
        files["files"]["state.json"] = {
            "size": state.stat().st_size,
            "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
        }
        head.write_text(json.dumps(files))
    with pytest.raises(RunError, match=r"versions, torch: '1.0.0' → "):
        resume()


def test_more_epochs_and_other_saving_are_allowed(settings: list[str]) -> None:
    start(settings)
    run = last()
    assert run.state == "done"
    result = resume(
        run.id, "train.num_train_epochs=3", "train.save_steps=1", "evaluate.max_generated_rows=1", "save_as=longer"
    )
    assert [step for step, _ in losses(last())] == list(range(1, 10))
    assert result.saved_as is not None
    assert result.saved_as.startswith("longer@")


def test_a_run_that_is_done_is_not_published_again(settings: list[str]) -> None:
    start(settings)
    with pytest.raises(RunError, match="is done, and saved as tickets@"):
        resume()


def test_a_run_is_resumed_from_any_folder(
    settings: list[str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    relative = [text.replace(str(rows), rows.name) for text in settings]
    with pytest.raises(Interrupted):
        start(relative, at(4, KeyboardInterrupt()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume().saved_as is not None


def test_a_full_disk_of_runs_does_not_cost_the_adapter(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry may be on another disk: the run ends there, and says what it could not keep."""
    true_save, true_text = inject.save_adapter, RunFolder.write_text

    def save(tuned: Any, folder: Path) -> Path:
        if runs() in folder.parents:
            raise OSError(28, "No space left on device")
        return true_save(tuned, folder)

    def text(self: RunFolder, name: str, content: str) -> Path:
        if name in ("samples.json", "status.json"):
            raise RunError(f"{name} cannot be written: No space left on device")
        return true_text(self, name, content)

    monkeypatch.setattr(inject, "save_adapter", save)
    monkeypatch.setattr(RunFolder, "write_text", text)
    said: list[Event] = []
    assert start(settings, said.append).saved_as is not None
    texts = [event.text for event in said if isinstance(event, Warned)]
    assert any("the adapter could not be kept in" in text for text in texts)
    assert any("samples.json cannot be written" in text for text in texts)
    assert any("how the run ended is not recorded" in text for text in texts)


def test_without_a_checkpoint_there_is_nothing_to_resume(settings: list[str]) -> None:
    with pytest.raises(Interrupted) as caught:
        start(settings, at(1, KeyboardInterrupt()))
    assert "--resume" not in str(caught.value)
    with pytest.raises(RunError, match="has no checkpoint to go on from"):
        resume()


def test_a_live_run_cannot_be_resumed(settings: list[str]) -> None:
    def second(event: Event) -> None:
        if isinstance(event, Progress) and "loss" in event.figures and event.done == 3:
            with pytest.raises(RunError, match=str(os.getpid())):
                resume()

    assert start(settings, second).saved_as is not None


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.training import checkpoint

    true = checkpoint.write_file

    def full(path: Path, data: bytes) -> None:
        if "step-00000003" in str(path) or "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        true(path, data)

    monkeypatch.setattr(checkpoint, "write_file", full)
    said: list[Event] = []
    assert start(settings, said.append).saved_as is not None
    texts = [str(getattr(event, "text", "")) for event in said]
    assert any(
        "no checkpoint of step 3 could be written: No space left on device; the last one is of step 2" in t
        for t in texts
    )


COMMAND = [sys.executable, "-m", "peftkit", "train"]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_stopped_by_a_signal(settings: list[str], number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    slow = [*settings, "train.num_train_epochs=40", "train.save_steps=5"]
    process = subprocess.Popen([*COMMAND, "qlora_sft", *slow], env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not list(runs().glob("*/checkpoints/step-*")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert (process.returncode, last().state) == (-9, "died")
    else:
        assert (process.returncode, last().state) == (130, "interrupted")
        assert f"go on with: peftkit train --resume {last().id}" in err
    done = subprocess.run(
        [*COMMAND, "--resume", last().id], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    start([*slow, "save_as=whole"])
    assert adapter_bytes("tickets") == adapter_bytes("whole")
