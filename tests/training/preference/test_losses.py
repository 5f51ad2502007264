"""The formulas against hand-worked values and float64."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from peftkit.training.preference.losses import dpo, kto, orpo
from peftkit.training.preference.spec import PreferenceTrainSpec


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand() -> None:
    # Log-ratios 2 and -3: the margin is 5, and β · 5 = 0.5.
    given = (t(-10.0), t(-20.0), t(-12.0), t(-17.0), t(4.0), t(6.0))
    assert float(dpo(*given, PreferenceTrainSpec())) == pytest.approx(-math.log(sigmoid(0.5)))
    assert float(dpo(*given, PreferenceTrainSpec(loss_type="hinge"))) == pytest.approx(0.5)
    # Per token 2/4 and -3/6: the margin is 1, and 1 / (2 · 0.1) = 5.
    assert float(dpo(*given, PreferenceTrainSpec(loss_type="ipo"))) == pytest.approx(16.0)
    robust = PreferenceTrainSpec(loss_type="robust", label_smoothing=0.1)
    expected = (0.9 * -math.log(sigmoid(0.5)) + 0.1 * math.log(sigmoid(-0.5))) / 0.8
    assert float(dpo(*given, robust)) == pytest.approx(expected)
    assert float(dpo(*given, PreferenceTrainSpec(sft_weight=2.0))) == pytest.approx(-math.log(sigmoid(0.5)) + 5.0)


def test_orpo_by_hand() -> None:
    # Mean likelihoods 1/2 and 1/4: odds 1 and 1/3, log odds ratio log 3, σ of it 3/4.
    found = orpo(4 * t(0.5).log(), 2 * t(0.25).log(), t(4.0), t(2.0), 0.3)
    assert float(found) == pytest.approx(math.log(2) - 0.3 * math.log(0.75))


@pytest.mark.parametrize("log_p", [-1e-6, -0.01, -0.69, -0.7, -3.0, -40.0])
def test_odds_lose_no_digits(log_p: float) -> None:
    value = torch.tensor([log_p], dtype=torch.float32, requires_grad=True)
    loss = orpo(torch.tensor([-1.0]), value, torch.ones(1), torch.ones(1), 1.0)
    exact = torch.tensor([log_p], dtype=torch.float64, requires_grad=True)
    odds = (-1.0 - math.log(-math.expm1(-1.0))) - (exact - torch.log(-torch.expm1(exact)))
    expected = 1.0 - torch.nn.functional.logsigmoid(odds)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    (slope,), (right,) = torch.autograd.grad(loss, value), torch.autograd.grad(expected, exact)
    assert float(slope) == pytest.approx(float(right), rel=1e-4)


def test_a_certain_answer_has_finite_odds() -> None:
    value = torch.zeros(1, requires_grad=True)
    loss = orpo(value, torch.tensor([-1.0]), torch.ones(1), torch.ones(1), 1.0)
    loss.backward()
    assert torch.isfinite(loss).all()
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()


def test_kto_by_hand() -> None:
    # Log-ratios 3 and 3 against a divergence of 1: β · 2 = 0.4 above it, wanted once and unwanted once.
    spec = PreferenceTrainSpec(loss="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    found = kto(t(-7.0, -7.0), t(-10.0, -10.0), torch.tensor([True, False]), t(1.0, 1.0), spec)
    assert found.tolist() == pytest.approx([1.5 * (1 - sigmoid(0.4)), 0.5 * (1 - sigmoid(-0.4))])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss": "orpo", "loss_type": "ipo"}, "loss_type is a setting of dpo"),
        ({"loss": "kto", "sft_weight": 1.0}, "sft_weight is a setting of dpo"),
        ({"loss": "dpo", "desirable_weight": 2.0}, "desirable_weight is a setting of kto"),
        ({"label_smoothing": 0.1}, "needs label_smoothing above 0, and no other reads it"),
        ({"loss_type": "robust"}, "needs label_smoothing above 0"),
        ({"trunk_cache": True}, "trunk_cache would change"),
        ({"regularize": {"r_drop": 1.0, "neftune_alpha": 5.0}}, "regularize.r_drop, regularize.neftune_alpha would"),
        ({"regularize": {"label_smoothing": 0.1}}, "regularize.label_smoothing would change"),
    ],
)
def test_no_setting_is_ignored(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PreferenceTrainSpec.model_validate(settings)
