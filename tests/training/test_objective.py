"""Regularizers inside a step: off is what a step was before, on is right however it is split, repeated or resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.data.chat import Example
from peftkit.errors import TrainingError
from peftkit.generation.forward import pad, token_nll
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.memory import checkpoint_activations, keep_activations
from peftkit.training.objective import Objective, Regularized, Work, objective
from peftkit.training.regularize.dropout import places_of_dropout
from peftkit.training.regularize.mixout import mixture
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step, StepResult
from peftkit.tuning.methods import AdapterSpec

CPU = torch.device("cpu")
RAGGED = (3, 30, 11, 7)
WHOLE = 4 * 30
"""Tokens of all four rows side by side."""
SHORT = 3 * 11
"""Tokens of the three short rows side by side: at this limit, or any below WHOLE, the long one goes alone."""
Rows = Callable[..., list[Example]]
Gradients = dict[str, torch.Tensor]

FGM = {"adversarial": "fgm", "adversarial_epsilon": 0.3}
FREELB = {"adversarial": "freelb", "adversarial_epsilon": 0.3, "adversarial_steps": 2, "adversarial_step_size": 0.2}
RANDOM: list[dict[str, Any]] = [
    {"neftune_alpha": 5.0}, {"mixout": 0.5}, {"dropout": 0.3}, {"dropout": 0.3, "r_drop": 1.0}, FREELB,
    {**FGM, "dropout": 0.3, "mixout": 0.2},
]  # fmt: skip
SURE: list[dict[str, Any]] = [{"label_smoothing": 0.1}, {"l1": 1e-3, "l2": 1e-2, "l2_sp": 1e-2}, FGM]


@pytest.fixture(scope="module")
def model(tuned: Callable[..., Any]) -> Any:
    """An adapter in the middle of its training: no factor is zero."""
    made = tuned(bits=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in made.trainable.values():
            nn.init.normal_(parameter, std=0.1)
    made.model.train()
    return made


@pytest.fixture(autouse=True)
def _as_it_was(model: Any) -> Iterator[None]:
    """No test leaves a hook, a gradient, another parameter or another rate behind, whatever it did."""
    before = dict(model.trainable)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield
    model.model.zero_grad(set_to_none=True)
    assert all(left is right for left, right in zip(model.trainable.values(), before.values(), strict=True))
    assert list(model.trainable) == list(before)
    assert not model.model.get_input_embeddings()._forward_hooks
    assert {getattr(module, name) for module, name in places_of_dropout(model.model)} == {0.0}


def stepped(
    model: Any, rows: list[Example], tokens: int, made: Objective | None = None
) -> tuple[StepResult, Gradients]:
    result = Step(model.model, rows, pad_id=2, device=CPU, objective=made).run(tokens)
    return result, taken(model)


def taken(model: Any) -> Gradients:
    found = {name: p.grad.clone() for name, p in model.trainable.items()}
    model.model.zero_grad(set_to_none=True)
    return found


def apart(first: Gradients, second: Gradients) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / second[name].norm()) for name in first)


def same(first: Gradients, second: Gradients) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def moved_start(model: Any, **settings: Any) -> Regularized:
    """An objective whose start is not where the tensors are now."""
    made = objective(model, RegularizeSpec(**settings))
    assert isinstance(made, Regularized)
    for value in [*made.penalties.start.values(), *made.matrices.values()]:
        value.mul_(0.5)
    return made


# -- off


def before_there_were_objectives(model: Any, rows: list[Example], split: list[list[int]]) -> tuple[float, Gradients]:
    """What a step computed then, statement by statement."""
    tokens, total = sum(label != -100 for row in rows for label in row.labels[1:]), 0.0
    for indices in split:
        nll = token_nll(model.model, pad([rows[i] for i in indices], 2, CPU)).sum()
        total += float(nll.detach())
        (nll * 1 / tokens).backward()
    return total / tokens, taken(model)


@pytest.mark.parametrize(("tokens", "split"), [(1, [[0], [3], [2], [1]]), (SHORT, [[0, 3, 2], [1]])])
def test_off_is_bitwise_what_it_was(model: Any, rows: Rows, tokens: int, split: list[list[int]]) -> None:
    made = rows(RAGGED)
    loss, expected = before_there_were_objectives(model, made, split)
    plain = objective(model, RegularizeSpec())
    assert type(plain) is Objective
    for each in (plain, None, Regularized(model, RegularizeSpec())):
        result, found = stepped(model, made, tokens, each)
        assert result.loss == loss
        assert same(found, expected)


def test_freelb_of_one_step_that_goes_nowhere_is_plain(model: Any, rows: Rows) -> None:
    nowhere = {**FREELB, "adversarial_steps": 1, "adversarial_step_size": 0.0, "adversarial_epsilon": 1e-30}
    expected = stepped(model, rows(RAGGED), SHORT)
    assert same(stepped(model, rows(RAGGED), SHORT, objective(model, RegularizeSpec(**nowhere)))[1], expected[1])


def test_r_drop_without_dropout_is_plain(model: Any, rows: Rows) -> None:
    """Two equal halves: the mean of both losses, and a divergence whose gradient is zero."""
    made = Regularized(model, RegularizeSpec(r_drop=3.0))
    result, found = stepped(model, rows(RAGGED), SHORT, made)
    plain, expected = stepped(model, rows(RAGGED), SHORT)
    assert result.loss == pytest.approx(plain.loss, rel=1e-6)
    assert apart(found, expected) < 1e-5  # the rounding of p - q, which is divided by nothing


# -- on


@pytest.mark.parametrize("settings", SURE, ids=str)
def test_one_batch_of_four_is_four_of_one(model: Any, rows: Rows, settings: dict[str, Any]) -> None:
    made = moved_start(model, **settings)
    whole, expected = stepped(model, rows(RAGGED), WHOLE, made)
    plain, without = stepped(model, rows(RAGGED), WHOLE)
    assert apart(without, expected) > 1e-3, "it is in force"
    assert whole.loss == pytest.approx(plain.loss, rel=1e-6), "what is shown is the NLL"
    assert whole.micro_batches == 1
    for tokens, micro_batches in ((1, 4), (SHORT, 2)):
        result, found = stepped(model, rows(RAGGED), tokens, made)
        assert result.micro_batches == micro_batches
        assert result.loss == pytest.approx(whole.loss, rel=1e-6)
        assert apart(found, expected) < (1e-5 if settings is FGM else 3e-6), "FGM's second pass begins with rounding"


class OncePerPass(Regularized):
    """The bug of a penalty that is added for every micro-batch, planted."""

    def gradients(self, work: Work) -> float:
        value = super().gradients(work)
        super().finish()
        return value

    def finish(self) -> None: ...


def test_a_penalty_for_every_micro_batch_would_be_caught(model: Any, rows: Rows) -> None:
    bug = OncePerPass(model, RegularizeSpec(l2=1e-2))
    assert apart(stepped(model, rows(RAGGED), WHOLE, bug)[1], stepped(model, rows(RAGGED), 1, bug)[1]) > 1e-3


def test_the_gradient_is_that_of_the_whole_formula(model: Any, rows: Rows) -> None:
    """Autograd through the mean smoothed loss of all answer tokens and all three penalties."""
    settings = {"label_smoothing": 0.1, "l1": 1e-3, "l2": 1e-2, "l2_sp": 1e-2}
    made = moved_start(model, **settings)
    found = stepped(model, rows(RAGGED), SHORT, made)[1]
    total, tokens = torch.zeros(()), 0
    for row in rows(RAGGED):
        logits, labels = model.model(torch.tensor([row.input_ids])).logits[0, :-1], torch.tensor(row.labels[1:])
        total = total + nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
        tokens += int((labels != -100).sum())
    loss = total / tokens
    for name, w in model.trainable.items():
        start = made.penalties.start[name]
        loss = loss + 1e-3 * w.abs().sum() + 0.5e-2 * w.square().sum() + 0.5e-2 * (w - start).square().sum()
    loss.backward()
    assert apart(found, taken(model)) < 3e-6


def test_the_start_is_where_the_tensors_were_when_the_objective_was_made(model: Any) -> None:
    made = objective(model, RegularizeSpec(l2_sp=0.5, mixout=0.5))
    assert isinstance(made, Regularized)
    name, parameter = next(iter(model.trainable.items()))
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.add_(2.0)
        made.finish()
        torch.testing.assert_close(taken(model)[name], torch.ones_like(before))
        assert torch.equal(made.matrices[name], before)
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def test_what_is_frozen_for_a_while_is_neither_mixed_nor_drawn_back(model: Any, rows: Rows) -> None:
    made = moved_start(model, mixout=0.5, l2_sp=0.5)
    for parameter in model.trainable.values():
        parameter.requires_grad_(False)
    try:
        plain = float(token_nll(model.model, pad(rows(RAGGED), 2, CPU)).sum())
        with mixture(model.model, made.matrices, 0.5):
            nll = float(token_nll(model.model, pad(rows(RAGGED), 2, CPU)).sum())
        made.finish()
        assert nll == plain
        assert all(parameter.grad is None for parameter in model.trainable.values())
    finally:
        for parameter in model.trainable.values():
            parameter.requires_grad_(True)


@pytest.mark.parametrize("settings", RANDOM, ids=str)
def test_repeating_a_step_draws_the_same(model: Any, rows: Rows, settings: dict[str, Any]) -> None:
    made = moved_start(model, **settings)
    step = Step(model.model, rows(RAGGED), pad_id=2, device=CPU, objective=made)
    first = step.run(SHORT)
    expected, after = taken(model), torch.get_rng_state()
    assert made.draws
    step.run(SHORT)
    assert apart(taken(model), expected) > 1e-3, "the draws differ from pass to pass"
    assert step.repeat(SHORT) == first
    assert same(taken(model), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("settings", [{"mixout": 0.5}, {"dropout": 0.3, "r_drop": 1.0}, FREELB], ids=str)
def test_gradient_checkpointing_computes_with_the_same_draws(model: Any, rows: Rows, settings: dict[str, Any]) -> None:
    made = moved_start(model, **settings)
    step = Step(model.model, rows(RAGGED), pad_id=2, device=CPU, objective=made)
    step.run(SHORT)
    expected = taken(model)
    checkpoint_activations(model)
    try:
        assert model.inner.is_activation_checkpointing
        step.repeat(SHORT)
    finally:
        keep_activations(model)
    assert apart(taken(model), expected) < 1e-6


def test_the_passes_of_an_ascent_drop_alike(model: Any, rows: Rows) -> None:
    """FreeLB's section 3.3. Two passes that go nowhere are one pass, if and only if they drop the same."""
    nowhere = {**FREELB, "adversarial_step_size": 0.0, "adversarial_epsilon": 1e-30, "dropout": 0.3}
    torch.manual_seed(1)
    two = stepped(model, rows((9,)), 1, objective(model, RegularizeSpec(**nowhere)))[1]
    torch.manual_seed(1)
    one = stepped(model, rows((9,)), 1, objective(model, RegularizeSpec(**{**nowhere, "adversarial_steps": 1})))[1]
    assert apart(two, one) < 1e-6


def test_the_mean_over_mixtures_is_the_gradient_at_the_weights(model: Any, rows: Rows) -> None:
    """A loss that is linear in one matrix: d/dw is kept/(1-p), whose expectation is 1."""
    made = moved_start(model, mixout=0.25)
    name = next(iter(made.matrices))
    parameter = model.trainable[name]
    kept = []
    for _ in range(40):
        with mixture(model.model, made.matrices, 0.25):
            (gradient,) = torch.autograd.grad(
                dict(model.model.named_parameters(remove_duplicate=False))[name].sum(), parameter
            )
        kept.append(gradient)
    n = 40 * parameter.numel()
    assert float(torch.stack(kept).double().mean()) == pytest.approx(1.0, abs=5 * (0.25 / 0.75 / n) ** 0.5)


def test_noise_is_for_training_alone(model: Any, rows: Rows) -> None:
    made = objective(model, RegularizeSpec(neftune_alpha=50.0))
    plain = stepped(model, rows(RAGGED), SHORT)[1]
    assert apart(stepped(model, rows(RAGGED), SHORT, made)[1], plain) > 0.1
    model.model.eval()
    try:
        assert same(stepped(model, rows(RAGGED), SHORT, made)[1], plain)
    finally:
        model.model.train()


# -- refused


def test_what_would_have_no_effect_is_refused(model: Any, tuned: Callable[..., Any]) -> None:
    with pytest.raises(TrainingError, match=r"r_drop=1 has no effect: nothing drops") as caught:
        objective(model, RegularizeSpec(r_drop=1.0))
    assert "adapter.lora_dropout" in str(caught.value)
    with pytest.raises(TrainingError, match="dropout=0 has no effect: the base has that rate already"):
        objective(model, RegularizeSpec(dropout=0.0))
    objective(model, RegularizeSpec(r_drop=1.0, dropout=0.1))
    objective(tuned(bits=32, lora_dropout=0.1), RegularizeSpec(r_drop=1.0))


@pytest.mark.parametrize(
    ("settings", "trunk_cache", "hint"),
    [
        ({}, False, "set adapter.lora_dropout=0.1 or train.regularize.dropout=0.1"),
        ({}, True, "set adapter.lora_dropout=0.1 or train.regularize.dropout=0.1 train.trunk_cache=false"),
        ({"method": "norms"}, False, "set train.regularize.dropout=0.1"),
        ({"method": "norms"}, True, "set train.regularize.dropout=0.1 train.trunk_cache=false"),
    ],
)
def test_a_hint_names_what_the_method_has_and_what_a_cached_trunk_goes_with(
    tuned: Callable[..., Any], settings: dict[str, Any], trunk_cache: bool, hint: str
) -> None:
    with pytest.raises(TrainingError, match="nothing drops") as caught:
        objective(tuned(bits=32, **settings), RegularizeSpec(r_drop=1.0), trunk_cache=trunk_cache)
    assert caught.value.hint == hint


def test_penalties_towards_zero_are_for_matrices_alone(tuned: Callable[..., Any]) -> None:
    """The neutral value of DoRA's magnitudes is the norm of the base's columns."""
    model = tuned(bits=32, method="dora")
    made = objective(model, RegularizeSpec(l1=1e-3, l2=1e-2))
    made.finish()
    pulled = {name for name, gradient in taken(model).items() if gradient.any()}
    assert pulled == {name for name in model.trainable if "lora_A" in name}, "lora_B is 0"


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"regularize": {"l2": 0.1}}, {"regularize": {"l1": 0.1}}])
@pytest.mark.parametrize("method", ["ia3", "norms"])
def test_a_decay_without_matrices_is_refused(
    tuned: Callable[..., Any], rows: Rows, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(TrainingError, match=r"has no effect with adapter\.method") as caught:
        train(tuned(bits=32, method=method), rows((5,)), TrainSpec(max_steps=1, **settings), tmp_path)
    assert "train.regularize.l2_sp=0.1" in str(caught.value)


class Vectors:
    """A model that trains a vector and has no dropout."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)
        self.trainable = {"bias": self.model.bias}
        self.backbone = self
        self.spec = AdapterSpec(method="bias_only")


def test_places_and_matrices_must_be_there() -> None:
    with pytest.raises(TrainingError, match="Linear has no place for dropout"):
        objective(Vectors(), RegularizeSpec(dropout=0.1))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="no matrix is trained"):
        objective(Vectors(), RegularizeSpec(mixout=0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "name"), [({"mixout": 0.1}, "mixout"), ({"neftune_alpha": 5.0}, "neftune_alpha"), (FGM, "adversarial")]
)
def test_what_a_sharded_base_cannot_have_is_refused(model: Any, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(TrainingError, match=rf"regularize\.{name} does not go with FSDP") as caught:
        objective(model, RegularizeSpec(**settings), sharded=True)
    assert "--multi_gpu" in str(caught.value)
    objective(model, RegularizeSpec(label_smoothing=0.1, l1=1.0, l2=1.0, l2_sp=1.0, dropout=0.1), sharded=True)


# -- in a run

RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 1}
ALL = {
    "label_smoothing": 0.1, "l1": 1e-4, "l2": 1e-3, "l2_sp": 1e-2, "mixout": 0.3, "dropout": 0.2, "r_drop": 1.0,
    "neftune_alpha": 5.0,
}  # fmt: skip
WORST = {"mixout": 0.3, "dropout": 0.2, "l2_sp": 1e-2, **FREELB}


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("settings", [ALL, pytest.param(WORST, marks=pytest.mark.full)], ids=["all", "freelb"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tuned: Callable[..., Any], rows: Rows, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """L2-SP and Mixout go back to where the run started, not to where it was taken up again."""

    def run(folder: Path, *, kill_at: int = 0, resume: bool = False) -> tuple[dict[int, float], Gradients]:
        torch.manual_seed(1234 if resume else 0)
        model, trace = tuned(bits=4, lora_dropout=0.1), {}

        def log(step: int, figures: dict[str, float]) -> None:
            trace[step] = figures["loss"]
            if step == kill_at:
                raise Killed

        kept = Checkpoints(folder)
        spec = TrainSpec(**RUN, regularize=RegularizeSpec(**settings))
        start = kept.newest() if resume else None
        train(model, rows((5, 9, 12, 7)), spec, folder / "t", checkpoints=kept, start=start, log=log)
        return trace, {name: p.detach().clone() for name, p in model.trainable.items()}

    expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", kill_at=3)
    found = run(tmp_path / "cut", resume=True)
    assert sorted(found[0]) == [3, 4]
    assert found[0].items() <= expected[0].items()
    assert same(found[1], expected[1])


def test_a_run_trains_with_its_regularizers(tuned: Callable[..., Any], rows: Rows, tmp_path: Path) -> None:
    """An L2 penalty that drowns the NLL: the first step of AdamW is w - η · sign(w)."""
    model = tuned(bits=32)
    start = {name: p.detach().clone() for name, p in model.trainable.items() if "lora_A" in name}
    once = {"max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "warmup_ratio": 0.0}
    train(model, rows((5, 9)), TrainSpec(**once, regularize=RegularizeSpec(l2=1e6)), tmp_path)
    for name, value in start.items():
        clear = value.abs() > 1e-3  # of a gradient of norm 1: AdamW's eps of 1e-8 is 1e-3 of the smallest
        moved = model.trainable[name].detach() - value
        torch.testing.assert_close(moved[clear], -1e-2 * value[clear].sign(), rtol=1e-2, atol=0)


def test_weight_decay_is_decoupled(tuned: Callable[..., Any], rows: Rows, tmp_path: Path) -> None:
    """w ← w - ηλw: after one step, two runs differ by ηλw⁰ in every number, whatever the gradient was."""
    ends = []
    for decay in (0.0, 0.5):
        model = tuned(bits=32)
        start = {name: p.detach().clone() for name, p in model.trainable.items()}
        once = {"max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "warmup_ratio": 0.0}
        train(model, rows((5, 9)), TrainSpec(**once, weight_decay=decay), tmp_path / str(decay))
        ends.append({name: p.detach().clone() for name, p in model.trainable.items()})
    compared = 0
    for name, value in start.items():
        expected = 1e-2 * 0.5 * value
        torch.testing.assert_close(
            ends[0][name] - ends[1][name], expected, rtol=0, atol=4 * 2**-24 * float(value.abs().max()) + 1e-9
        )
        compared += int((expected.abs() > 1e-5).sum())
    assert compared > 1000
