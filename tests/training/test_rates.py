"""Rates by step and depth are the published formulas, and the optimizer moves each tensor by exactly its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers import get_scheduler

from peftkit.data.chat import Example
from peftkit.errors import TrainingError
from peftkit.events import Decision
from peftkit.training import rates
from peftkit.training.groups import parameter_groups
from peftkit.training.layerwise import FreezeOutSpec, LayerwiseSpec
from peftkit.training.rates import annealed, freezing_times, multipliers, scheduled, slanted_triangular
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.depth import Depths, depths
from peftkit.tuning.methods import METHODS
from peftkit.tuning.tuned import Tuned

Rows = Callable[..., list[Example]]
Make = Callable[..., Tuned]

TWELVE = Depths({}, tuple(nn.Identity() for _ in range(12)), "layers")
"""The depths of a BERT-base."""


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0), (1, 0.1), (9, 0.9), (10, 1), (11, 0.999695), (32, 0.859670), (55, 0.5), (77, 0.152671), (99, 0.000305),
     (100, 0)],
)  # fmt: skip
def test_cosine_by_table(step: int, factor: float) -> None:
    assert scheduled(TrainSpec(warmup_ratio=0.1), step, 100) == pytest.approx(factor, abs=5e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.floats(0, 0.9), st.sampled_from(["constant", "constant_with_warmup", "linear", "cosine"])
)
def test_schedules_are_bitwise_those_of_transformers(steps: int, warmup: float, name: Any) -> None:
    spec = TrainSpec(lr_scheduler_type=name, **({} if name == "constant" else {"warmup_ratio": warmup}))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, rates.warmup_steps(spec, steps), steps).lr_lambdas[0]
    assert [scheduled(spec, step, steps) for step in range(steps)] == [theirs(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0003125), (50, 0.00515625), (100, 0.01), (550, 0.00515625), (1000, 0.0003125)]
)
def test_slanted_triangular_by_table(step: int, rate: float) -> None:
    assert 0.01 * slanted_triangular(step, 1000) == pytest.approx(rate, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(0, 499))
def test_slanted_triangular_is_the_papers_formula(tens: int, step: int) -> None:
    steps = 10 * tens
    step %= steps
    cut = math.floor(steps * 0.1)
    share = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / 0.1 - 1))
    assert slanted_triangular(step, steps) == pytest.approx((1 + share * 31) / 32, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200))
def test_slanted_triangular_stays_within_its_ratio(steps: int) -> None:
    """The paper's own denominator goes below 0 for 19 steps: 1 - 17 / 9."""
    assert all(1 / 32 - 1e-12 <= slanted_triangular(step, steps) <= 1 for step in range(steps + 1))
    assert 1 - (18 - 1) / (1 * (1 / 0.1 - 1)) < 0


def test_discriminative_rates_of_ulmfit() -> None:
    found = multipliers(LayerwiseSpec(decay=1 / 2.6), TWELVE, range(14))
    table = [1, 0.384615, 0.147929, 0.056896, 0.021883, 0.008417]
    assert [found[13 - at] for at in range(6)] == pytest.approx(table, abs=5e-7)
    assert found[1] == pytest.approx(1.05e-5, rel=5e-3)  # 2.6⁻¹²: the lowest block of a BERT stands still
    assert found[1] == pytest.approx(2.6**-12, rel=1e-12)


def test_a_table_of_rates() -> None:
    spec = LayerwiseSpec(rates={"embeddings": 0.1, "0-9": 0.5, "10": 0.7, "11": 0.8, "head": 2})
    found = multipliers(spec, TWELVE, [0, 1, 10, 11, 12, 13])
    assert found == {0: 0.1, 1: 0.5, 10: 0.5, 11: 0.7, 12: 0.8, 13: 2}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"0-9": 1.0}, "has no rate for block 10, block 11"),
        ({"0-9": 1.0, "9-11": 1.0}, "'9-11', and block 9 is named before"),
        ({"0-12": 1.0}, "'0-12', and the base has 12 blocks"),
        ({"0-11": 1.0, "head": 1.0}, "'head', where nothing is trained"),
    ],
)
def test_a_table_that_does_not_fit(table: dict[str, float], words: str) -> None:
    with pytest.raises(TrainingError) as caught:
        multipliers(LayerwiseSpec(rates=table), TWELVE, range(1, 13))
    assert words in str(caught.value)


def freezeout(**settings: Any) -> dict[int, float]:
    return freezing_times(FreezeOutSpec(**settings), [3, 1, 2, 0, 4])


def test_freezeout_freezes_at_its_shares() -> None:
    assert freezeout(t_0=0.5) == pytest.approx({0: 0.5, 1: 0.625, 2: 0.75, 3: 0.875, 4: 1})
    assert freezeout(t_0=0.5, cubed=True) == pytest.approx(
        {0: 0.125, 1: 0.244140625, 2: 0.421875, 3: 0.669921875, 4: 1}
    )
    assert freezeout(t_0=1.0) == dict.fromkeys(range(5), 1)
    assert freezeout() == {}
    assert freezing_times(FreezeOutSpec(t_0=0.5), [7]) == {7: 1}


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 1), st.integers(1, 400))
def test_freezeout_is_the_codes_formula(until: float, steps: int) -> None:
    """densenet.py of ajbrock/FreezeOut: 0.05 (1 + cos(π j / max_j)) for a rate of 0.1, and nothing after max_j."""
    last = until * steps
    for step in range(steps):
        theirs = 0.05 * (1 + math.cos(math.pi * step / last)) if step < last - 1e-9 else 0.0
        assert 0.1 * annealed(until, step, steps) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layerwise": {"decay": 0.9, "rates": {"head": 1.0}}}, "two ways .*train.layerwise.decay=null"),
        ({"layerwise": {"rates": {"layer 3": 1.0}}}, "names no depth"),
        ({"layerwise": {"rates": {"5-2": 1.0}}}, "names no depth"),
        ({"layerwise": {"rates": {"head": 0.0}}}, "must be above 0"),
        ({"layerwise": {"decay": 1.1}}, "less than or equal to 1"),
        ({"unfreeze": {"every_steps": 2, "groups": 3}},
         "without a direction: .*, or train.unfreeze.every_steps=null train.unfreeze.groups=1"),
        ({"unfreeze": {"groups": 2}}, "without a direction: .*, or train.unfreeze.groups=1"),
        ({"unfreeze": {"direction": "deep_first"}}, "needs train.unfreeze.every_epochs or train.unfreeze.every_steps"),
        ({"unfreeze": {"direction": "deep_first", "every_steps": 2, "every_epochs": 1}},
         "are two paces: set train.unfreeze.every_epochs=null or"),
        ({"freezeout": {"cubed": True}}, "belong to a t_0"),
        ({"freezeout": {"t_0": 0.5}, "unfreeze": {"direction": "deep_first", "every_epochs": 2},
          "lr_scheduler_type": "linear", "warmup_ratio": 0.1},
         "train.unfreeze.direction=none train.unfreeze.every_epochs=null train.lr_scheduler_type=cosine "
         "train.warmup_ratio=0.03"),
        ({"freezeout": {"t_0": 0.5}, "lr_scheduler_type": "linear"}, "lr_scheduler_type=linear would be ignored"),
        ({"freezeout": {"t_0": 0.5}, "warmup_ratio": 0.1}, "warmup_ratio=0.1 would be ignored"),
        ({"lr_scheduler_type": "slanted_triangular", "warmup_ratio": 0.1}, "warmup_ratio=0.1 would be ignored"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, "train.lr_scheduler_type=constant_with_warmup"),
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSpec(**settings)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_constant_has_a_warmup_where_its_name_says_so(name: Any) -> None:
    spec = TrainSpec(lr_scheduler_type=name, **({"warmup_ratio": 0.5} if name != "constant" else {}))
    warm = [0.0, 0.2, 0.4, 0.6, 0.8] if name != "constant" else [1.0] * 5
    assert [scheduled(spec, step, 10) for step in range(10)] == pytest.approx([*warm, *[1.0] * 5])
    assert rates.warmup_steps(spec, 10) == (5 if name != "constant" else 0)


@pytest.mark.parametrize("settings", [{"freezeout": {"t_0": 0.5}}, {"lr_scheduler_type": "constant"}], ids=str)
def test_no_warmup_is_what_these_have(settings: dict[str, Any]) -> None:
    assert rates.warmup_steps(TrainSpec(**settings, warmup_ratio=0.0), 100) == 0


def test_however_small_its_share_a_depth_trains_at_the_first_step() -> None:
    assert rates.frozen_from(1e-12, 100) == 1
    assert annealed(1e-12, 0, 100) == 1.0
    assert annealed(1e-12, 1, 100) == 0.0


def test_settings_survive_their_own_dump() -> None:
    """A resumed run reads all settings from a file, the untouched ones too."""
    for given_ones in ({}, {"freezeout": {"t_0": 0.5}}, {"lr_scheduler_type": "slanted_triangular"}):
        assert TrainSpec(**TrainSpec(**given_ones).model_dump()) == TrainSpec(**given_ones)


def assert_moved(
    tuned: Tuned, examples: list[Example], folder: Path, rate: Callable[[str], float], **settings: Any
) -> None:
    """One step of SGD takes from each tensor its gradient times `rate(name)`, bit by bit."""
    gradients: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in tuned.trainable.items():
            generator = torch.Generator().manual_seed(len(name))
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)  # or lora_A would have no gradient
            keep = partial(lambda name, parameter: gradients.update({name: parameter.grad.clone()}), name)
            parameter.register_post_accumulate_grad_hook(keep)
    before = {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}
    spec = TrainSpec(max_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=0.7, max_grad_norm=1e9,
                     **settings)  # fmt: skip
    train(tuned, examples, spec, folder)
    assert len(gradients) == 28
    for name, parameter in tuned.trainable.items():
        assert not torch.equal(parameter, before[name]), name
        assert torch.equal(parameter, before[name].add(gradients[name], alpha=-rate(name))), name


def test_one_step_moves_every_depth_by_its_rate(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=32)
    at = depths(model.model)
    assert {at.of[name] for name in model.names} == {1, 2}
    spec = LayerwiseSpec(decay=0.3)
    assert_moved(model, rows((9, 12)), tmp_path, lambda name: 0.7 * 0.3 ** (2 - at.of[name]), layerwise=spec)


def test_lora_plus_moves_lora_b_by_its_ratio(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=32, method="lora_plus", lora_plus_ratio=4.0)
    assert_moved(model, rows((9, 12)), tmp_path, lambda name: 0.7 * (4.0 if ".lora_B." in name else 1.0))


def test_the_groups_are_as_few_as_the_rates(tuned: Make) -> None:
    model = tuned(bits=32)
    at = depths(model.model)

    def groups(**settings: Any) -> list[tuple[int, float, float]]:
        spec = TrainSpec(learning_rate=1.0, **settings)
        return [(len(group.names), group.rate, group.weight_decay) for group in parameter_groups(model, at, spec)]

    assert groups() == [(28, 1, 0)]
    assert groups(weight_decay=0.1) == [(28, 1, 0.1)]
    assert groups(layerwise=LayerwiseSpec(decay=0.5)) == [(14, 0.5, 0), (14, 1, 0)]
    assert groups(layerwise=LayerwiseSpec(decay=1.0)) == [(28, 1, 0)]
    assert groups(layerwise=LayerwiseSpec(rates={"0-1": 0.3})) == [(28, 0.3, 0)]
    scaled = [(14, 2, 0), (14, 1, 0)]
    assert groups(freezeout=FreezeOutSpec(t_0=0.5, scaled=True)) == scaled
    dora = tuned(bits=32, method="dora")
    spec = TrainSpec(weight_decay=0.1, learning_rate=1.0)
    found = parameter_groups(dora, depths(dora.model), spec)
    assert [(len(group.names), group.weight_decay) for group in found] == [(28, 0.1), (14, 0.0)]
    assert all("magnitude" in name for name in found[1].names)


def test_lora_plus_of_ratio_one_is_lora_bit_by_bit(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    found = []
    for adapter in ({"method": "lora"}, {"method": "lora_plus", "lora_plus_ratio": 1.0}):
        model = tuned(bits=4, **adapter)
        train(model, rows((9, 12, 7)), TrainSpec(max_steps=2, learning_rate=1e-2), tmp_path)
        found.append([parameter.detach().clone() for parameter in model.trainable.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_rate_that_is_logged_is_the_highest(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    logged: dict[int, dict[str, float]] = {}
    spec = TrainSpec(max_steps=10, per_device_train_batch_size=1, learning_rate=0.01, save_steps=100,
                     lr_scheduler_type="slanted_triangular", layerwise=LayerwiseSpec(decay=0.5))  # fmt: skip
    train(tuned(bits=4), rows((5, 6)), spec, tmp_path, log=logged.__setitem__)
    expected = [0.01 * slanted_triangular(step, 10) for step in range(10)]  # of the highest trained depth
    assert [logged[step]["learning_rate"] for step in range(1, 11)] == pytest.approx(expected, rel=1e-12)


def test_without_a_rate_the_methods_own_is_taken_and_said(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    said: list[Any] = []
    logged: dict[int, dict[str, float]] = {}
    for rate in (None, 0.1):
        spec = TrainSpec(max_steps=1, lr_scheduler_type="constant", learning_rate=rate)
        model = tuned(bits=4, method="rslora")
        train(model, rows((5, 6)), spec, tmp_path, report=said.append, log=logged.__setitem__)
        default = METHODS["rslora"].learning_rate
        assert logged[1]["learning_rate"] == (rate or default)
        told = [event for event in said if isinstance(event, Decision) and event.what == "learning rate"]
        assert [event.choice for event in told] == [f"{default:g}"]  # a rate that was given is taken without a word
