"""What of a prediction is explained: settings only, so that reading them loads nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.config import Spec

Baseline = Literal["pad", "mask", "zero"]

MOST_STEPS = 2048
"""Points that are visited at most."""


class ExplainSpec(Spec):
    """Which score is explained, against what, and how finely."""

    target: str | None = None
    """Label or tag whose logit is explained; None is the predicted one, of several labels the most probable."""
    word: int | None = Field(default=None, gt=0)
    """Token heads: the number of the word whose tag is explained; the first is 1."""
    baseline: Baseline = "pad"
    """What the text's tokens are compared with: the embedding of the fill or the mask token, or zeros."""
    steps: int = Field(default=32, gt=0, le=MOST_STEPS)
    """Points of the integral to begin with; more are added where they are needed until the attributions add up."""
