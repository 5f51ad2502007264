"""What is frozen at a step has no gradient, no optimizer state and no graph, and stays as it is until it is thawed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from peftkit.data.chat import Example
from peftkit.errors import TrainingError
from peftkit.events import Note, Warned
from peftkit.training import unfreezing
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.course import Course
from peftkit.training.layerwise import FreezeOutSpec, LayerwiseSpec, UnfreezeSpec
from peftkit.training.memory import checkpoint_activations, keep_activations
from peftkit.training.sft import Trained, train
from peftkit.training.spec import TrainSpec
from peftkit.training.trainer import StepTrainer
from peftkit.training.unfreezing import check_freezing, spans
from peftkit.tuning.depth import depths
from peftkit.tuning.tuned import Tuned

Rows = Callable[..., list[Example]]
Make = Callable[..., Tuned]
DEEP = UnfreezeSpec(direction="deep_first", every_steps=2)
SHALLOW = UnfreezeSpec(direction="shallow_first", every_steps=2)


def begins(depths: list[int], *, rows: int = 16, steps: int = 12, per_step: int = 4, **settings: Any) -> dict[int, int]:
    """The first step of each depth, where it trains to the end; `steps` where it never does."""
    spec = TrainSpec(per_device_train_batch_size=per_step, unfreeze=UnfreezeSpec(**settings))
    found = spans(spec, depths, rows=rows, steps=steps)
    assert all(span.stop == steps for span in found.values())
    return {depth: span.start for depth, span in sorted(found.items())}


def test_directions_and_paces_by_hand() -> None:
    deep = {"direction": "deep_first"}
    assert begins([0, 1, 2, 3], **deep, every_steps=2) == {0: 6, 1: 4, 2: 2, 3: 0}
    assert begins([0, 1, 2, 3], direction="shallow_first", every_steps=2) == {0: 0, 1: 2, 2: 4, 3: 6}
    assert begins([1, 2, 5], **deep, every_steps=3) == {1: 6, 2: 3, 5: 0}  # depths without trained tensors do not count
    assert begins([0, 1, 2, 3], **deep, every_steps=2, groups=2) == {0: 2, 1: 2, 2: 0, 3: 0}
    assert begins([0, 1, 2], **deep, every_epochs=1) == {0: 8, 1: 4, 2: 0}  # 16 rows are 4 steps
    assert begins([0, 1, 2], **deep, every_epochs=1, rows=10) == {0: 5, 1: 3, 2: 0}  # an epoch is two steps and a half
    assert begins([0, 1, 2], **deep, every_epochs=0.1, rows=40) == {0: 2, 1: 1, 2: 0}  # three tenths are no float
    assert begins([0, 1], **deep, every_steps=50) == {0: 12, 1: 0}
    assert begins([0, 1], direction="none") == {0: 0, 1: 0}
    with pytest.raises(TrainingError, match="all of the 2 depths"):
        begins([1, 2], **deep, every_steps=2, groups=2)


def test_freezeout_ends_by_hand() -> None:
    spec = TrainSpec(freezeout=FreezeOutSpec(t_0=0.5))
    assert spans(spec, [4, 2, 3], rows=9, steps=10) == {2: range(5), 3: range(8), 4: range(10)}
    cubed = TrainSpec(freezeout=FreezeOutSpec(t_0=0.5, cubed=True))
    assert spans(cubed, [4, 2, 3], rows=9, steps=64) == {2: range(8), 3: range(27), 4: range(64)}


class Watch:
    """What every step found frozen or training, from the gradients' norm on, and all numbers after it."""

    def __init__(self, tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tuned, self.at = tuned, depths(tuned.model)
        self.training: list[set[int]] = []
        self.steps: list[dict[str, torch.Tensor]] = [self.values()]
        watch, told = self, StepTrainer._tell

        def tell(self: StepTrainer, norm: float) -> None:
            watch.look(self.optimizer)
            told(self, norm)

        monkeypatch.setattr(StepTrainer, "_tell", tell)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.tuned.model.named_parameters()}

    def look(self, optimizer: Optimizer) -> None:
        named = self.tuned.trainable
        with_gradient = {name for name, parameter in named.items() if parameter.grad is not None}
        assert with_gradient == {name for name, parameter in named.items() if parameter.requires_grad}
        depth = {self.at.of[name] for name in with_gradient}
        assert with_gradient == {name for name in named if self.at.of[name] in depth}
        now = self.values()
        if self.training:  # the update of the step before
            self.compare(self.steps[-1], now, self.training[-1])
            self.steps.append(now)
        with_state = {name for name, parameter in named.items() if parameter in optimizer.state}
        before = self.training[-1] if self.training else set()
        # A depth that was thawed for this step has no state before its first update.
        assert with_state == {name for name in named if self.at.of[name] in depth & before}
        for name in with_state:
            assert int(optimizer.state[named[name]]["step"]) == sum(self.at.of[name] in then for then in self.training)
        self.training.append(depth)

    def compare(self, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], training: set[int]) -> None:
        trained = set(self.tuned.names)
        for name, value in after.items():
            expected = name in trained and self.at.of[name] in training
            assert torch.equal(value, before[name]) != expected, name


def run(
    tuned: Tuned, rows: Rows, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[list[set[int]], list[Any]]:
    """The depths that trained at every step, each of them checked, and what was said."""
    with torch.no_grad():
        for name, parameter in tuned.trainable.items():
            if "lora_" in name:
                parameter += 0.1  # a lora_B of 0 leaves lora_A without a gradient
    watch, said = Watch(tuned, monkeypatch), []
    spec = TrainSpec(**{"max_steps": 5, "lr_scheduler_type": "constant", "learning_rate": 0.01, "save_steps": 100,
                        "per_device_train_batch_size": 2, **settings})  # fmt: skip
    train(tuned, rows((9, 12, 7)), spec, folder, report=said.append)
    watch.compare(watch.steps[-1], watch.values(), watch.training[-1])
    assert all(parameter.requires_grad for parameter in tuned.trainable.values())
    return watch.training, [event for event in said if isinstance(event, Note | Warned)]


def test_deep_first(tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(bits=32, method="full")
    training, said = run(model, rows, tmp_path, monkeypatch, unfreeze=DEEP.model_copy(update={"every_steps": 1}))
    assert training == [{3}, {2, 3}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    total = len(model.names)
    assert [event.text for event in said if "train" in event.text and "step" in event.text] == [
        f"step 1: embeddings, block 0, block 1 frozen; 1 of {total} tensors train",
        f"step 2: block 1 thawed; 10 of {total} tensors train",
        f"step 3: block 0 thawed; 19 of {total} tensors train",
        f"step 4: embeddings thawed; {total} of {total} tensors train",
    ]


def test_shallow_first_and_what_is_never_thawed(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, said = run(tuned(bits=4), rows, tmp_path, monkeypatch, max_steps=2, unfreeze=SHALLOW)
    assert training == [{1}, {1}]
    warned = [event.text for event in said if isinstance(event, Warned)]
    assert warned == ["14 of 28 trained tensors are never thawed in this run and stay as they are"]


def test_freezeout_freezes_from_below(tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"freezeout": FreezeOutSpec(t_0=0.4, scaled=True), "lr_scheduler_type": "cosine", "weight_decay": 0.1}
    training, said = run(tuned(bits=4), rows, tmp_path, monkeypatch, **settings)
    assert training == [{1, 2}, {1, 2}, {2}, {2}, {2}]
    assert [event.text for event in said] == [
        "2 learning rates, from 0.01 to 0.025",  # scaled: block 0 trains for two fifths of the run
        "step 3: block 0 frozen; 14 of 28 tensors train",
    ]


def test_a_state_that_is_kept_is_caught(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: a frozen depth keeps its optimizer state."""

    def forgetful(self: unfreezing.Unfreezing, step: int, optimizer: Optimizer) -> None:
        for name, parameter in self.tuned.trainable.items():
            parameter.requires_grad_(step in self.spans[self.depths.of[name]])

    monkeypatch.setattr(unfreezing.Unfreezing, "begin", forgetful)
    with pytest.raises(AssertionError):
        run(tuned(bits=4), rows, tmp_path, monkeypatch, freezeout=FreezeOutSpec(t_0=0.4), lr_scheduler_type="cosine")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.full)])
def test_the_backward_pass_ends_at_the_lowest_trained_tensor(
    tuned: Make, rows: Rows, tmp_path: Path, bits: int, checkpointing: bool
) -> None:
    """No graph reaches the frozen blocks, so nothing is saved for them, and their layers run no backward."""
    model = tuned(bits=bits, method="norms", layers="top:1")
    seen: dict[int, set[bool]] = {0: set(), 1: set()}
    for index, block in enumerate(depths(model.model).blocks):

        def note(block: Any, args: Any, output: torch.Tensor, index: int = index) -> None:
            if torch.is_grad_enabled():  # not in the passes that find the shortcuts
                seen[index].add(output.requires_grad)

        block.register_forward_hook(note)
    spec = TrainSpec(max_steps=1, gradient_checkpointing=checkpointing)
    train(model, rows((9, 12)), spec, tmp_path)
    assert seen == {0: {False}, 1: {True}}
    checkpoint_activations(model)
    model.model.train()
    model.model(input_ids=torch.tensor([[1, 2, 3]]))
    keep_activations(model)
    assert seen == {0: {False}, 1: {True}}


def test_input_gradients_through_the_whole_trunk_are_caught(tuned: Make) -> None:
    """The planted bug, and what upstream does with checkpointing: the embeddings' output requires a gradient."""
    model = tuned(bits=4, method="norms", layers="top:1")
    model.inner.enable_input_require_grads()
    seen: list[bool] = []
    depths(model.model).blocks[0].register_forward_hook(lambda block, args, output: seen.append(output.requires_grad))
    model.model.train()
    model.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert seen == [True]


class Killed(BaseException):
    """Stands for kill -9."""


# Killed where the next part is thawed by the resumed run's first step, and where one has been frozen for a while.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "deep_first": (3, {"unfreeze": DEEP, "layerwise": LayerwiseSpec(decay=0.5),
                       "lr_scheduler_type": "slanted_triangular"}),
    "freezeout": (4, {"freezeout": FreezeOutSpec(t_0=0.5, scaled=True)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(tuned: Make, rows: Rows, tmp_path: Path, kind: str) -> None:
    at, settings = KINDS[kind]
    spec = TrainSpec(max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, save_steps=1, **settings)

    def go(folder: Path, at: int | None = None) -> list[torch.Tensor]:
        model, checkpoints = tuned(bits=4, lora_dropout=0.2), Checkpoints(folder)

        def log(step: int, figures: dict[str, float]) -> None:
            if step == at:
                raise Killed

        start = checkpoints.newest()
        torch.manual_seed(0 if start is None else 1234)
        train(model, rows((9, 12, 7)), spec, folder / "trainer", checkpoints=checkpoints, start=start, log=log)
        return [parameter.detach().clone() for parameter in model.trainable.values()]

    whole = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "cut", at)
    assert len(Checkpoints(tmp_path / "cut").newest().state["optimizer"]["state"]) == 14  # of 28
    assert all(torch.equal(a, b) for a, b in zip(go(tmp_path / "cut"), whole, strict=True))


def test_freezing_does_not_go_with_a_sharded_base() -> None:
    check_freezing(TrainSpec(), sharded=True)
    for settings in ({"unfreeze": DEEP}, {"freezeout": FreezeOutSpec(t_0=0.5)}):
        check_freezing(TrainSpec(**settings), sharded=False)
        with pytest.raises(TrainingError, match="FSDP"):
            check_freezing(TrainSpec(**settings), sharded=True)


def stepped(
    model: Tuned, rows: Rows, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[list[int], Trained]:
    """The steps at which a run's watchdog began anew, counted from 0, and what the run did."""
    begun: list[int] = []
    training = StepTrainer.training_step

    def step(self: StepTrainer, *args: Any) -> torch.Tensor:
        monkeypatch.setattr(self.watchdog, "begin_anew", lambda: begun.append(self.journal.step))
        return training(self, *args)

    spec = TrainSpec(**{"per_device_train_batch_size": 1, "lr_scheduler_type": "constant", "save_steps": 1, **settings})
    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patched:
        patched.setattr(StepTrainer, "training_step", step)
        done = train(model, rows((9, 12)), spec, folder / "trainer", held_out=rows((7,)), checkpoints=checkpoints,
                     start=checkpoints.newest())  # fmt: skip
    return begun, done


@pytest.mark.parametrize(
    ("settings", "changes"), [({"unfreeze": DEEP}, [2]), ({"freezeout": FreezeOutSpec(t_0=0.5)}, [3]), ({}, [])]
)
def test_the_watchdog_begins_anew_where_other_depths_train(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any],
    changes: list[int],
) -> None:  # fmt: skip
    if "freezeout" in settings:
        settings = {**settings, "lr_scheduler_type": "cosine"}
    steps = 6 if "freezeout" in settings else 4
    (begun, _) = stepped(tuned(bits=4), rows, tmp_path, monkeypatch, max_steps=steps, **settings)
    assert begun == changes


def test_a_resumed_run_begins_no_more_anew_than_the_whole_one(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth 1 is frozen when a run is resumed at step 1, as it was before: nothing has changed."""
    stepped(tuned(bits=4), rows, tmp_path, monkeypatch, max_steps=1, unfreeze=DEEP)
    (begun, _) = stepped(tuned(bits=4), rows, tmp_path, monkeypatch, max_steps=2, unfreeze=DEEP)
    assert begun == []
    (begun, _) = stepped(tuned(bits=4), rows, tmp_path, monkeypatch, max_steps=3, unfreeze=DEEP)
    assert begun == [2]


def test_patience_waits_for_the_last_thaw(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measurement is worse than the first. The last depth is thawed after step 5, and the run ends at step 7."""
    nlls = iter(range(1, 13))
    monkeypatch.setattr(Course, "_held_out_nll", lambda self: float(next(nlls)))
    slow = UnfreezeSpec(direction="deep_first", every_steps=5)
    settings = {"max_steps": 12, "eval_steps": 1, "early_stopping_patience": 2}
    (_, done) = stepped(tuned(bits=4), rows, tmp_path, monkeypatch, unfreeze=slow, **settings)
    assert done.steps == 7
    assert done.best_step == 1
