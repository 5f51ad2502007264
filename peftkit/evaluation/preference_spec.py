"""What is measured of preferences: settings only, so that reading them loads no torch."""

from __future__ import annotations

from pydantic import Field

from peftkit.config import Spec


class PreferenceEvaluateSpec(Spec):
    """What is measured before and after."""

    batch_size: int = Field(default=16, gt=0)
    """Answers measured at once."""
    retention: str | None = "general"
    """Text file on which forgetting is measured; `general` ships with peftkit, null skips it."""
    retention_passages: int | None = Field(default=None, gt=0)
    """Measure forgetting on the first so many passages only."""
