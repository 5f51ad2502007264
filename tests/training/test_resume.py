"""A resumed run is the uninterrupted run: same trace, same adapter bit by bit, wherever it was stopped or killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.data.chat import Example
from peftkit.errors import RunError, TrainingError
from peftkit.events import Warned
from peftkit.training import checkpoint
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.sft import Stopped, Trained, train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned

Rows = Callable[..., list[Example]]
Make = Callable[..., Tuned]
Trace = dict[int, dict[str, float]]

# Dropout, shuffling over three epochs, accumulation in ragged micro-batches, and measurements in between.
SPEC = TrainSpec(
    num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_steps=2,
    learning_rate=1e-2, save_steps=1, save_total_limit=100, warmup_ratio=0.3,
)  # fmt: skip
LENGTHS = (5, 9, 12, 7, 6, 11, 8)
STEPS = 6


class Killed(BaseException):
    """Stands for kill -9: nothing of peftkit's may catch it."""


def run(
    make: Make, rows: Rows, folder: Path, *, spec: TrainSpec = SPEC, resume: bool = False, bits: int = 4, **options: Any
) -> tuple[Tuned, Trained, Trace]:
    """One process of a run, as a fresh one would begin it; the trace has what the process logged."""
    torch.manual_seed(1234 if resume else 0)  # a new process begins with another random state
    tuned = make(bits=bits, lora_dropout=0.2)
    trace: Trace = {}
    before = options.pop("on_log", lambda step: None)

    def log(step: int, figures: dict[str, float]) -> None:
        before(step)
        trace.setdefault(step, {}).update({key: figures[key] for key in figures if key in COMPARED})

    checkpoints = Checkpoints(folder)
    start = checkpoints.newest() if resume else None
    trained = train(
        tuned, rows(LENGTHS), spec, folder / "trainer", held_out=rows((6, 10)), checkpoints=checkpoints, start=start,
        log=log, **options,
    )  # fmt: skip
    return tuned, trained, trace


COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "answer_tokens", "micro_batches", "held_out_nll")


def adapter(tuned: Tuned) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}


def assert_same(found: tuple[Tuned, Trained, Trace], expected: tuple[Tuned, Trained, Trace], first: Trace) -> None:
    assert {**first, **found[2]} == expected[2]
    assert (found[1].steps, found[1].tokens, found[1].first_loss, found[1].last_loss, found[1].best_step) == (
        expected[1].steps, expected[1].tokens, expected[1].first_loss, expected[1].last_loss, expected[1].best_step,
    )  # fmt: skip
    left, right = adapter(found[0]), adapter(expected[0])
    assert [name for name in right if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def whole(tuned: Make, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Trained, Trace]:
    """The run that nobody stopped."""
    found = run(tuned, rows, tmp_path_factory.mktemp("whole"))
    assert sorted(found[2]) == list(range(1, STEPS + 1))
    assert [step for step in found[2] if "held_out_nll" in found[2][step]] == [2, 4, 6]
    return found


EARLY_AND_LATE = (2, 5)


@pytest.mark.parametrize(
    "at", [at if at in EARLY_AND_LATE else pytest.param(at, marks=pytest.mark.full) for at in range(1, STEPS + 1)]
)
def test_killed_at_any_step(tuned: Make, rows: Rows, tmp_path: Path, whole: Any, at: int) -> None:
    """Killed after the gradients of step `at` and before its update: the checkpoint before it is what there is."""
    first: Trace = {}

    def kill(step: int) -> None:
        first.setdefault(step, {})
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        run(tuned, rows, tmp_path / "cut", on_log=kill)
    assert Checkpoints(tmp_path / "cut").steps() == list(range(1, at))
    resumed = run(tuned, rows, tmp_path / "cut", resume=True)
    assert sorted(resumed[2]) == list(range(at, STEPS + 1))
    assert_same(resumed, whole, {step: whole[2][step] for step in range(1, at)})


@pytest.mark.parametrize("bits", [8, 16])
def test_over_every_precision(tuned: Make, rows: Rows, tmp_path: Path, bits: int) -> None:
    expected = run(tuned, rows, tmp_path / "whole", bits=bits)

    def kill(step: int) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        run(tuned, rows, tmp_path / "cut", bits=bits, on_log=kill)
    assert_same(run(tuned, rows, tmp_path / "cut", bits=bits, resume=True), expected, expected[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(
    tuned: Make, rows: Rows, tmp_path: Path, whole: Any, number: signal.Signals
) -> None:
    said: list[Any] = []
    spec = SPEC.model_copy(update={"save_steps": 100})
    before = signal.getsignal(number)

    def send(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as caught:
        run(tuned, rows, tmp_path / "cut", spec=spec, on_log=send, report=said.append)
    assert (caught.value.step, caught.value.total, caught.value.kept) == (3, STEPS, 3)
    assert signal.getsignal(number) is before
    assert any(number.name in event.text for event in said if isinstance(event, Warned))
    assert_same(run(tuned, rows, tmp_path / "cut", resume=True), whole, whole[2])


def test_a_second_signal_ends_at_once(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    def send(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tuned, rows, tmp_path / "cut", on_log=send)
    assert Checkpoints(tmp_path / "cut").steps() == [1, 2]


@pytest.mark.full
def test_resumed_twice_and_after_the_end(tuned: Make, rows: Rows, tmp_path: Path, whole: Any) -> None:
    for at in (2, 5):

        def kill(step: int, at: int = at) -> None:
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            run(tuned, rows, tmp_path / "cut", resume=at > 2, on_log=kill)
    assert_same(run(tuned, rows, tmp_path / "cut", resume=True), whole, whole[2])
    # A run that died while it was measured has nothing left to train.
    again = run(tuned, rows, tmp_path / "cut", resume=True)
    assert again[2] == {}
    assert_same(again, whole, whole[2])


@pytest.mark.full
def test_more_epochs_go_on_from_the_end(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    """With a constant rate, three epochs and then three more are six."""
    settings = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "num_train_epochs": 4.0}
    short = SPEC.model_copy(update=settings)  # 28 rows: 7 whole steps
    long = SPEC.model_copy(update={**settings, "num_train_epochs": 8.0})
    expected = run(tuned, rows, tmp_path / "long", spec=long)
    run(tuned, rows, tmp_path / "short", spec=short)
    assert_same(run(tuned, rows, tmp_path / "short", spec=long, resume=True), expected, expected[2])


def test_fewer_steps_than_were_done_are_refused(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    run(tuned, rows, tmp_path / "run")
    with pytest.raises(TrainingError, match="has done 6 steps, and with these settings it has 2") as caught:
        run(tuned, rows, tmp_path / "run", spec=SPEC.model_copy(update={"max_steps": 2}), resume=True)
    assert "raise train.num_train_epochs" in str(caught.value)


def test_early_stopping_goes_on_with_the_best(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    """A rate that ruins the adapter: what is kept is the adapter of the best step, and a resumed run agrees."""
    ruinous = {"learning_rate": 0.5, "warmup_ratio": 0.0, "eval_steps": 1, "early_stopping_patience": 2,
               "num_train_epochs": 20.0, "save_total_limit": 1}  # fmt: skip
    spec = SPEC.model_copy(update=ruinous)
    expected = run(tuned, rows, tmp_path / "whole", spec=spec)
    nlls = {step: figures["held_out_nll"] for step, figures in expected[2].items()}
    best = min(nlls, key=nlls.__getitem__)
    assert expected[1].best_step == best
    assert expected[1].steps == max(nlls) < 35
    assert all(value >= nlls[best] for step, value in nlls.items() if step > best)
    kept = Checkpoints(tmp_path / "whole")
    assert kept.steps() == sorted({best, max(nlls)}), "the last one and the best one"
    best_adapter = kept.load(best).state["adapter"]
    assert all(torch.equal(value, best_adapter[name]) for name, value in adapter(expected[0]).items())

    def kill(step: int) -> None:
        if step == max(nlls):
            raise Killed

    with pytest.raises(Killed):
        run(tuned, rows, tmp_path / "cut", spec=spec, on_log=kill)
    assert_same(run(tuned, rows, tmp_path / "cut", spec=spec, resume=True), expected, expected[2])


def test_a_damaged_checkpoint_is_passed_over(tuned: Make, rows: Rows, tmp_path: Path, whole: Any) -> None:
    said: list[Any] = []

    def kill(step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tuned, rows, tmp_path / "cut", on_log=kill)
    state = tmp_path / "cut" / "step-00000004" / "state.safetensors"
    state.chmod(0o644)
    data = bytearray(state.read_bytes())
    data[-3] ^= 1
    state.write_bytes(data)
    with pytest.raises(RunError, match="has other bytes"):
        Checkpoints(tmp_path / "cut").load(4)
    found = Checkpoints(tmp_path / "cut", said.append).newest()
    assert found is not None
    assert found.step == 3
    assert "step-00000004" in said[0].text
    resumed = run(tuned, rows, tmp_path / "cut", resume=True)
    assert_same(resumed, whole, whole[2])
    assert Checkpoints(tmp_path / "cut").load(4).step == 4, "the step was done again, and its checkpoint replaced"


def test_a_damaged_newest_one_never_outlives_good_ones(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    """With one checkpoint kept, going on from before a damaged one must not end with the damaged one alone."""
    spec = SPEC.model_copy(update={"save_total_limit": 1, "save_steps": 2, "eval_steps": None})

    def kill(step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tuned, rows, tmp_path, spec=spec, on_log=kill)
    kept = Checkpoints(tmp_path)
    shutil.copytree(kept.path(4), kept.path(2))  # an older good one, under the name of step 2
    for file in kept.path(4).glob("*"):
        file.chmod(0o644)
        file.write_bytes(b"damaged")
    state = kept.load(2).state
    assert state["journal"]["step"] == 4
    kept.forget_after(2)
    assert kept.steps() == [2]


@pytest.mark.full
def test_killed_inside_the_save(
    tuned: Make, rows: Rows, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each call of the fourth checkpoint's write: what is resumed from the third is the same run."""
    true, calls = checkpoint.write_file, [0]
    for at in (1, 2, 3):

        def die(path: Path, data: bytes, at: int = at) -> None:
            if "step-00000004" in str(path):
                calls[0] += 1
                if calls[0] == at:
                    raise Killed
            true(path, data)

        folder, calls[0] = tmp_path / str(at), 0
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_file", die)
            with pytest.raises(Killed):
                run(tuned, rows, folder)
        assert Checkpoints(folder).steps() == [1, 2, 3]
        assert_same(run(tuned, rows, folder, resume=True), whole, whole[2])


@pytest.mark.full
def test_the_best_adapter_needs_no_room_on_the_disk(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint could not be written: the run goes on with it all the same."""
    ruinous = {"learning_rate": 0.5, "warmup_ratio": 0.0, "eval_steps": 1, "early_stopping_patience": 2}
    spec = SPEC.model_copy(update=ruinous)
    expected = run(tuned, rows, tmp_path / "room", spec=spec)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    found = run(tuned, rows, tmp_path / "full", spec=spec)
    assert_same(found, expected, expected[2])
    assert Checkpoints(tmp_path / "full").steps() == []


def test_a_signal_in_the_last_step_ends_the_run_too(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    sent: list[int] = []

    def send(step: int) -> None:
        if step == STEPS and not sent:  # that step is logged twice: its figures, and its measurement
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped) as caught:
        run(tuned, rows, tmp_path, on_log=send)
    assert (caught.value.step, caught.value.kept) == (STEPS, STEPS)


@pytest.mark.full
@pytest.mark.parametrize("left_out", ["adapter", "optimizer", "random", "scheduler", "journal"])
def test_nothing_in_a_checkpoint_can_be_left_out(
    tuned: Make, rows: Rows, tmp_path: Path, whole: Any, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the wrong step in one part must show in the trace or in the adapter."""

    def kill(step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tuned, rows, tmp_path / "cut", on_log=kill)
    true = Checkpoints.load
    stale = Checkpoints(tmp_path / "cut").load(2).state[left_out]

    def mixed(self: Checkpoints, step: int) -> Any:
        found = true(self, step)
        found.state[left_out] = stale
        return found

    monkeypatch.setattr(Checkpoints, "load", mixed)
    with pytest.raises(AssertionError):
        assert_same(run(tuned, rows, tmp_path / "cut", resume=True), whole, whole[2])
