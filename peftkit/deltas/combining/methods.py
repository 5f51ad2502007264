"""The methods of combining: one table, name → formula, options with their ranges, source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftkit.canonical import canonical_json
from peftkit.deltas.combining import arithmetic
from peftkit.deltas.combining.arithmetic import Dense, Factored
from peftkit.errors import DeltaError


@dataclass(frozen=True)
class Option:
    """A number that a method takes, from `low` to `high`."""

    default: float
    low: float
    high: float
    what: str
    above: bool = False
    """Whether `low` itself is excluded."""
    whole: bool = False

    @property
    def range(self) -> str:
        """As it is written in messages: a number above 0 and at most 1."""
        if self.low == -math.inf:
            return "a finite number"
        kind = "a whole number" if self.whole else "a number"
        top = "" if self.high == math.inf else f" and at most {self.high:g}"
        return f"{kind} {'above' if self.above else 'of at least'} {self.low:g}{top}"

    def fits(self, value: Any) -> bool:
        """Whether `value` is a number within the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return self.low <= value <= self.high and math.isfinite(value) and not (self.above and value == self.low)


@dataclass(frozen=True)
class Method:
    """One way to make one delta of several."""

    summary: str
    paper: str
    dense: Dense
    factored: Factored | None = None
    """The same from LoRA's factors, where that is possible: cheaper, and exact before the rank is cut."""
    options: Mapping[str, Option] = field(default_factory=dict)
    ranked: bool = True
    """Whether an adapter of it needs a rank to be brought to."""
    pair: bool = False
    """Whether it takes exactly two adapters."""
    additive: bool = False
    """Whether it is Σ wᵢ ΔWᵢ, so that any rows of it can be had alone."""

    @property
    def random(self) -> bool:
        """Whether it draws: the same seed gives the same result."""
        return "seed" in self.options


_SCALE = Option(1.0, -math.inf, math.inf, "multiplies the result (λ of the paper)")
_SEED = Option(0, 0, 2**63 - 1, "of what is dropped; together with the names of tensor and adapter", whole=True)


def _density(default: float) -> Option:
    return Option(default, 0, 1, "share of each ΔW's entries that is kept", above=True)


METHODS: dict[str, Method] = {
    "exact": Method(
        "Σ wᵢ ΔWᵢ, factors side by side: no error, the rank is the sum of the ranks",
        "arXiv 2212.04089",
        arithmetic.linear,
        arithmetic.linear_factored,
        ranked=False,
        additive=True,
    ),
    "svd": Method(
        "Σ wᵢ ΔWᵢ, brought to a rank in the best way (Eckart and Young, 1936)",
        "arXiv 2212.04089",
        arithmetic.linear,
        arithmetic.linear_factored,
        additive=True,
    ),
    "linear": Method(
        "PEFT's name for Σ wᵢ ΔWᵢ. There A and B are averaged apart; here it is the ΔW of exact at a rank, as svd",
        "arXiv 2212.04089",
        arithmetic.linear,
        arithmetic.linear_factored,
        additive=True,
    ),
    "ties": Method(
        "trim the small entries, elect a sign, average those that agree",
        "arXiv 2306.01708",
        arithmetic.ties,
        options={"density": _density(0.2), "scale": _SCALE},
    ),
    "dare_linear": Method(
        "drop entries by chance, rescale the rest, sum",
        "arXiv 2311.03099",
        arithmetic.dare_linear,
        options={"density": _density(0.5), "seed": _SEED},
    ),
    "dare_ties": Method(
        "drop entries by chance, rescale the rest, elect a sign, average those that agree",
        "arXiv 2311.03099",
        arithmetic.dare_ties,
        options={"density": _density(0.5), "scale": _SCALE, "seed": _SEED},
    ),
    "della": Method(
        "drop small entries likelier than large ones, rescale the rest, elect a sign, average those that agree",
        "arXiv 2406.11617",
        arithmetic.della,
        options={
            "density": _density(0.5),
            "epsilon": Option(0.1, 0, 1, "width of the window of probabilities around 1 − density"),
            "scale": _SCALE,
            "seed": _SEED,
        },
    ),
    "breadcrumbs": Method(
        "drop the largest and the smallest entries, sum",
        "arXiv 2312.06795",
        arithmetic.breadcrumbs,
        options={
            "density": _density(0.9),
            "gamma": Option(0.01, 0, 1, "share of the largest entries that is dropped"),
        },
    ),
    "slerp": Method(
        "the way from one direction to the other on the sphere, lengths in between; t = w₂ / (w₁ + w₂)",
        "Shoemake, SIGGRAPH 1985",
        arithmetic.slerp,
        pair=True,
    ),
    "magnitude_prune": Method(
        "trim the small entries, sum",
        "arXiv 2306.01708, trimming alone",
        arithmetic.magnitude_prune,
        options={"density": _density(0.2)},
    ),
    "knots": Method(
        "TIES in the directions that all deltas share (one SVD of them side by side)",
        "arXiv 2410.19735",
        arithmetic.knots,
        arithmetic.knots_factored,
        options={"density": _density(0.2), "scale": _SCALE},
    ),
}


def check_weights(weights: Sequence[float]) -> None:
    """Raise DeltaError for weights that are no numbers, or that float32 factors cannot hold."""
    fine = [_SCALE.fits(weight) and (weight == 0 or 1e-6 <= abs(weight) <= 1e6) for weight in weights]
    wrong = [f"{weight!r}" for weight, fits in zip(weights, fine, strict=True) if not fits]
    if wrong:
        raise DeltaError(
            f"{', '.join(wrong)} cannot be a weight", expected="0, or a number from 1e-6 to 1e6, such as 0.5, 1 or -1"
        )


@dataclass(frozen=True)
class How:
    """A method with its options. Raises DeltaError for one that does not exist, or is out of its range."""

    method: str = "exact"
    options: Mapping[str, float] = field(default_factory=dict)
    """Those that are not the default."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DeltaError(
                f"there is no method {self.method!r}", expected="one of " + ", ".join(METHODS), hint="--method exact"
            )
        known = self.entry.options
        problems = [f"{name!r} is no option of {self.method}" for name in self.options if name not in known]
        for name, option in known.items():
            if not option.fits(self.options.get(name, option.default)):
                problems.append(f"{name} is {self.options.get(name)!r}, not {option.range}")
        problems = problems or self._contradictions()
        if problems:
            takes = "; ".join(f"{name} ({option.range}, {option.default:g})" for name, option in known.items())
            raise DeltaError("; ".join(problems), expected=f"for {self.method}: {takes or 'no options'}")

    @property
    def entry(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def values(self) -> dict[str, float]:
        """All options with their values."""
        return {name: self.options.get(name, option.default) for name, option in self.entry.options.items()}

    def draws(self, tensor: str, block: int, references: Sequence[str]) -> list[torch.Generator]:
        """A generator for each adapter's part of a tensor (of a block of it): the same in any order and sharding."""
        found = []
        for reference in references if self.entry.random else ():
            key = canonical_json([self.values["seed"], tensor, block, reference])
            seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
            found.append(torch.Generator().manual_seed(seed))
        return found

    def check_weights(self, weights: Sequence[float], adapters: int) -> None:
        """Raise DeltaError unless there is one finite weight for each adapter, and as many as the method takes."""
        if not adapters or len(weights) != adapters:
            raise DeltaError(f"{len(weights)} weights for {adapters} adapters", expected="one weight for each adapter")
        check_weights(weights)
        if self.entry.pair and adapters != 2:
            raise DeltaError(f"{self.method} takes 2 adapters, {adapters} were given", hint="--method ties or linear")
        if self.entry.pair and (min(weights) < 0 or sum(weights) <= 0):
            raise DeltaError(
                f"the weights of {self.method} are {', '.join(f'{weight:g}' for weight in weights)}",
                expected="two numbers of at least 0 that are not both 0",
            )

    def as_record(self) -> dict[str, Any]:
        """Method and options as plain JSON."""
        return {"method": self.method, "options": self.values}

    def _contradictions(self) -> list[str]:
        values = self.values
        if self.method == "breadcrumbs" and values["density"] + values["gamma"] > 1 + 1e-12:
            return [f"density {values['density']:g} and gamma {values['gamma']:g} are more than 1 together"]
        room = 2 * min(values.get("density", 1), 1 - values.get("density", 1))
        if self.method == "della" and room and not values["epsilon"] < room:
            return [f"epsilon {values['epsilon']:g} leaves probabilities outside 0 to 1, not a number below {room:g}"]
        return []
