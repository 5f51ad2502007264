"""Integrated gradients of functions whose integrals are known, and completeness as the judge of wrong ones."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import BackboneError, ConfigError, DataError
from peftkit.evaluation.explaining import integrate
from peftkit.evaluation.explaining.integrate import TOLERANCE, Integral, Score, integrated_gradients
from peftkit.evaluation.explaining.spec import MOST_STEPS
from peftkit.events import Event, Warned

pytest.importorskip("captum")

# Captum holds the weights of its rule in float32; their sum is off by a few of its steps.
_FLOAT32 = 16 * float(np.finfo(np.float32).eps)


def attributed(score: Score, point: torch.Tensor, baseline: torch.Tensor, **options: Any) -> Integral:
    return integrated_gradients(score, point, baseline, **{"steps": 16, "at_once": 8, **options})


def test_of_a_linear_score_it_is_gradient_times_difference() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, point, baseline = (torch.randn(5, 3, generator=draw, dtype=torch.float64) for _ in range(3))
    found = attributed(lambda x: (x * weight).sum(dim=(1, 2)) + 7, point, baseline, steps=1)
    torch.testing.assert_close(found.values, weight * (point - baseline), rtol=_FLOAT32, atol=0)
    assert found.at_point == pytest.approx(float((weight * point).sum()) + 7)
    assert found.steps == 1


def test_of_a_product_each_factor_gets_half() -> None:
    """∂(xy)/∂x along (αx, αy) is αy: x · y / 2 for each; x² gives x², x³y gives ¾ and ¼ of x³y."""
    point, baseline = torch.tensor([3.0, 5.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    found = attributed(lambda x: x[:, 0] * x[:, 1], point, baseline)
    assert found.values.tolist() == pytest.approx([7.5, 7.5], rel=_FLOAT32)
    found = attributed(lambda x: x[:, 0] ** 3 * x[:, 1], point, baseline)
    assert found.values.tolist() == pytest.approx([101.25, 33.75], rel=_FLOAT32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 3))
def test_equal_to_a_plain_sum_in_numpy_and_complete(seed: int, scale: float) -> None:
    """The reference: tanh(x W) · v with its gradient written out, at 20,000 midpoints."""
    draw = np.random.default_rng(seed)
    w, v, x, b = (draw.normal(size=shape) for shape in ((4, 6), (6,), (4,), (4,)))
    w *= scale
    at = (np.arange(20_000) + 0.5) / 20_000
    slopes = (v * (1 - np.tanh((b + at[:, None] * (x - b)) @ w) ** 2)) @ w.T
    wanted = slopes.mean(axis=0) * (x - b)
    weight, out = torch.from_numpy(w), torch.from_numpy(v)
    found = attributed(lambda z: torch.tanh(z @ weight) @ out, torch.from_numpy(x), torch.from_numpy(b))
    change = float(np.tanh(x @ w) @ v - np.tanh(b @ w) @ v)
    assert found.at_point - found.at_baseline == pytest.approx(change)
    assert found.residual <= TOLERANCE
    # Both rules miss a little: ours by its residual, where the terms may cancel.
    assert np.abs(found.values.numpy() - wanted).max() <= 2 * TOLERANCE * max(abs(change), np.abs(wanted).max())


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=5))
@settings(max_examples=25, deadline=None)
def test_symmetric_inputs_get_equal_shares_whatever_is_beside_them(values: list[float]) -> None:
    """Sundararajan et al. 2017, symmetry-preserving: x0 and x1 enter alike and have equal values and baselines."""
    point = torch.tensor([values[0], values[0], *values[1:]], dtype=torch.float64)
    rest = torch.arange(1.0, len(point) - 1, dtype=torch.float64)
    found = attributed(
        lambda x: torch.sin(x[:, 0] + x[:, 1] + (x[:, 2:] * rest).sum(dim=1)), point, torch.full_like(point, 0.3)
    )
    assert found.values[0] == found.values[1]


def test_steps_go_where_the_path_bends() -> None:
    """A step of width 1e-5: even steps would have to be 100,000."""
    told: list[Event] = []
    sharp = lambda x: torch.tanh((x[:, 0] - 0.3) * 1e5)  # noqa: E731
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = attributed(sharp, one, zero, report=told.append)
    assert found.residual <= TOLERANCE
    assert 16 < found.steps < MOST_STEPS
    assert not [event for event in told if isinstance(event, Warned)]


def test_what_does_not_add_up_is_said_with_the_value() -> None:
    """A jump has no gradient: half of the difference can never be found."""
    told: list[Event] = []
    jump = lambda x: x[:, 0] + (x[:, 0] > 0.5)  # noqa: E731
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = attributed(jump, one, zero, report=told.append)
    assert found.residual == pytest.approx(0.5)
    (warned,) = [event for event in told if isinstance(event, Warned)]
    assert "50 % are off" in warned.text


@pytest.mark.parametrize("planted", ["baseline forgotten", "one end of the path only", "input in place of difference"])
def test_a_planted_bug_does_not_pass_completeness(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from captum.attr import IntegratedGradients

    class Wrong(IntegratedGradients):  # type: ignore[misc]
        def attribute(self, inputs: Any, baselines: Any, **options: Any) -> Any:
            if planted == "baseline forgotten":
                return super().attribute(inputs, **options)
            if planted == "one end of the path only":
                inputs = inputs.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.forward_func(inputs).sum(), inputs)
                return slope * (inputs - baselines)
            return super().attribute(inputs, baselines, **options) / (inputs - baselines) * inputs

    monkeypatch.setattr(integrate, "method", lambda: Wrong)
    monkeypatch.setattr(integrate, "MOST_STEPS", 64)
    told: list[Event] = []
    point, baseline = torch.tensor([1.0, 2.0]), torch.tensor([0.4, 0.9])
    found = attributed(lambda x: torch.exp(x).sum(dim=1), point, baseline, report=told.append)
    assert found.residual > TOLERANCE
    assert [event for event in told if isinstance(event, Warned)]


def test_a_score_that_does_not_change() -> None:
    point = torch.ones(2)
    found = attributed(lambda x: x[:, 0] - x[:, 1], point, torch.zeros(2))
    assert (found.residual, found.values.tolist()) == (0.0, [1.0, -1.0])
    assert Integral(point, 1.0, 1.0, 8).residual == math.inf


def test_scores_without_a_gradient_or_without_a_number_are_refused() -> None:
    one, zero = torch.ones(2), torch.zeros(2)
    with pytest.raises(BackboneError, match="no gradient"):
        attributed(lambda x: x.detach().sum(dim=1), one, zero)
    with pytest.raises(DataError, match="the score is not finite"):
        attributed(lambda x: torch.log(x).sum(dim=1), one, zero)
    with pytest.raises(DataError, match="the gradient is not finite"):
        attributed(lambda x: torch.where(x > 0.2, torch.sqrt(x - 0.2), x * 0).sum(dim=1), one, zero)


def test_without_captum_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=r"attribution needs the package 'captum") as caught:
        attributed(lambda x: x.sum(dim=1), torch.ones(2), torch.zeros(2))
    assert caught.value.hint == "pip install 'peftkit[explain]'"
