"""How much of a delta is left after rounding: sums over entries, and the shares they give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_DIGITS = 6
"""Sums of other machines differ in their last digits; a receipt should not."""


@dataclass(frozen=True)
class Kept:
    """Sums over the entries of one tensor or of many; ΔŴ is what the stored numbers differ by from the base's."""

    entries: int = 0
    unchanged: int = 0
    """Entries that are stored as they would be without the delta."""
    delta: float = 0.0
    """‖ΔW‖²."""
    base: float = 0.0
    """‖W‖²."""
    lost: float = 0.0
    """⟨ΔŴ − ΔW, ΔW⟩."""
    noise: float = 0.0
    """‖ΔŴ − ΔW‖²."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def share(self) -> float | None:
        """⟨ΔŴ, ΔW⟩ / ‖ΔW‖²: 1 when nothing is lost, None for a delta of zeros."""
        return 1 + self.lost / self.delta if self.delta else None

    @property
    def relative_noise(self) -> float | None:
        """‖ΔŴ − ΔW‖ / ‖ΔW‖, None for a delta of zeros."""
        return math.sqrt(self.noise / self.delta) if self.delta else None

    @property
    def finite(self) -> bool:
        """Whether every number that went in was finite."""
        return all(math.isfinite(value) for value in (self.delta, self.base, self.lost, self.noise))

    def figures(self) -> dict[str, Any]:
        """The shares and norms, to six digits."""
        size = math.sqrt(self.delta / self.base) if self.base else None
        found = {"kept": self.share, "noise": self.relative_noise, "delta_norm": math.sqrt(self.delta)}
        rounded = {name: _short(value) for name, value in (found | {"delta_to_base": size}).items()}
        return rounded | {"entries": self.entries, "unchanged": self.unchanged}


def total(parts: Iterable[Kept]) -> Kept:
    """The sums over all parts."""
    found = Kept()
    for part in parts:
        found = found + part
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
