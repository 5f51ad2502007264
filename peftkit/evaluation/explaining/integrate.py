"""Integrated gradients of any score, with steps added where they are needed until the gradients add up.

Sundararajan, Taly and Yan 2017, eq. 1: IG_i = (x_i - b_i) · ∫₀¹ ∂f/∂x_i (b + α (x - b)) dα. Their Proposition 1,
completeness: Σ_i IG_i = f(x) - f(b), so what is missing of that difference says how good the integral is.

Steps go where the path bends, by halving. Above a baseline of zeros a base with an RMSNorm before each block (Llama)
bends at α = 1e-7 still: on a random one of two layers 1024 points of one rule miss 53 % of the difference, and 960
points that are placed where they are needed 0.7 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.errors import BackboneError, DataError
from peftkit.evaluation.explaining.spec import MOST_STEPS
from peftkit.events import Phase, Progress, Report, Warned, silent
from peftkit.extras import extra

Score = Callable[[torch.Tensor], torch.Tensor]
"""Points of shape (n, …) → a number for each, of shape (n,)."""

TOLERANCE = 0.01
"""Share of f(x) - f(baseline) that may be missing from the sum of the attributions."""


@dataclass(frozen=True)
class Integral:
    """Integrated gradients of one point."""

    values: torch.Tensor
    """Of every input number its share of the difference; float64, on the CPU, in the shape of the point."""
    at_point: float
    at_baseline: float
    steps: int

    @property
    def residual(self) -> float:
        """|Σ IG - (f(x) - f(b))| / |f(x) - f(b)|; infinite where f does not change and the sum is not 0."""
        change = self.at_point - self.at_baseline
        missing = abs(float(self.values.sum()) - change)
        return missing / abs(change) if change else (math.inf if missing else 0.0)


def method() -> Any:
    """Captum's class of the method. Raises ConfigError where captum is not installed."""
    with extra("explain", "attribution"):
        from captum.attr import IntegratedGradients
    return IntegratedGradients


def integrated_gradients(
    score: Score, point: torch.Tensor, baseline: torch.Tensor, *, steps: int, at_once: int, report: Report = silent
) -> Integral:
    """Integrate by Gauss and Legendre (captum) over the path, then halve its worst stretch until the sum is right.

    Each stretch has `steps` points, and completeness holds for each by itself: that is how the worst is known. It ends
    before more than MOST_STEPS points were visited. `point` and `baseline` have the same shape, without a batch axis;
    `at_once` points go through `score` together. No gradient is left on a parameter. Raises BackboneError where no
    gradient reaches the point, DataError where the score is not finite.
    """
    integrate = method()(score).attribute
    _check_gradient(score, point)

    def stretch(start: float, end: float) -> _Stretch:
        low, high = (baseline + at * (point - baseline) for at in (start, end))
        values = integrate(high[None], low[None], n_steps=steps, internal_batch_size=at_once)[0]
        return _Stretch(start, end, values.detach().double().cpu(), _value(score, low), _value(score, high))

    parts, visited = [stretch(0.0, 1.0)], steps
    found = _joined(parts, steps)
    if found.residual > TOLERANCE:
        report(Phase("integrate where the score bends", MOST_STEPS, "points"))
    while found.residual > TOLERANCE and visited + 2 * steps <= MOST_STEPS:
        worst = max(parts, key=lambda part: abs(part.missing))
        parts.remove(worst)
        middle = (worst.start + worst.end) / 2
        parts += [stretch(worst.start, middle), stretch(middle, worst.end)]
        visited += 2 * steps
        found = _joined(parts, steps)
        report(Progress(visited, {}))
    if found.residual > TOLERANCE:
        report(Warned(_incomplete(found), "another --baseline, with embeddings that are not 0, or --bits 32"))
    return found


@dataclass(frozen=True)
class _Stretch:
    """A part of the straight path from the baseline (0) to the point (1), and the score at its ends."""

    start: float
    end: float
    values: torch.Tensor
    at_start: float
    at_end: float

    @property
    def missing(self) -> float:
        return float(self.values.sum()) - (self.at_end - self.at_start)


def _joined(parts: Sequence[_Stretch], steps: int) -> Integral:
    values = torch.stack([part.values for part in parts]).sum(dim=0)
    if not bool(values.isfinite().all()):
        raise _not_finite("the gradient")
    first, last = min(parts, key=lambda part: part.start), max(parts, key=lambda part: part.end)
    return Integral(values, last.at_end, first.at_start, steps * len(parts))


def _value(score: Score, point: torch.Tensor) -> float:
    with torch.no_grad():
        value = float(score(point[None])[0])
    if not math.isfinite(value):
        raise _not_finite("the score")
    return value


def _check_gradient(score: Score, point: torch.Tensor) -> None:
    """Raise BackboneError where the score does not depend on the point as far as autograd can see."""
    with torch.enable_grad():
        reached = score(point[None].detach().clone().requires_grad_()).requires_grad
    if not reached:
        raise BackboneError(
            "no gradient of the score reaches the base's input: its layers in this precision have none on this device",
            expected="layers with a backward pass",
            hint="--bits 16 or --bits 4",
        )


def _not_finite(what: str) -> DataError:
    return DataError(
        f"{what} is not finite between the baseline and the text",
        expected="finite numbers",
        hint="load the base in higher precision: --bits 32",
    )


def _incomplete(found: Integral) -> str:
    change, total = found.at_point - found.at_baseline, float(found.values.sum())
    return (
        f"the attributions add up to {total:.4g}, and the score changes by {change:.4g} from the baseline to the text: "
        f"{100 * found.residual:.3g} % are off with {found.steps} steps, where {100 * TOLERANCE:g} % are allowed"
    )
