"""Settings of what is judged on held-out rows: the gate, the search for weights, and how rows are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftkit.release.measured import LEAST_TOKENS
from peftkit.release.search import Objective


@dataclass(frozen=True)
class GateSettings:
    """What a combination must keep to be registered."""

    keep: float
    """Share of each parent's gain, at the lower end of its interval."""
    min_tokens: int = LEAST_TOKENS


@dataclass(frozen=True)
class SearchSettings:
    """How to look for weights."""

    trials: int = 30
    objective: Objective = "mean"
    """Of the tasks' NLL / the parent's own: their mean, or the worst of them."""
    min_tokens: int = LEAST_TOKENS


@dataclass(frozen=True)
class Judging:
    """Held-out rows and how they are measured, for gate and search alike."""

    rows: Mapping[str, Path] = field(default_factory=dict)
    """Files by adapter (`name` or `name@version`); the others are looked for in the runs that made the adapters."""
    batch_size: int = 8
    seed: int = 0
    """Of the search, and of the bootstrap."""
