"""How far a model prefers a secret to others of its form: exposure (Carlini et al., arXiv 1802.08232)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

ALTERNATIVES = 64
"""Others of the same form that a secret is ranked among."""
MOST = math.log2(ALTERNATIVES + 1)
"""The exposure of a secret that the model prefers to every other one, in bits; it may be higher still."""
_SETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def forms(secret: str) -> int:
    """How many strings have the form of `secret`: a digit for a digit, an ASCII letter of its case for a letter."""
    return math.prod(len(_same(char)) for char in secret)


def alternatives(secret: str, *, seed: int = 0) -> list[str]:
    """ALTERNATIVES distinct strings of the secret's form, without itself; needs more `forms` than that."""
    draw = random.Random(f"{seed} {secret}")
    found: dict[str, None] = {}
    while len(found) < ALTERNATIVES:
        made = "".join(draw.choice(_same(char)) for char in secret)
        if made != secret:
            found[made] = None
    return list(found)


def exposure(secret: float, others: Sequence[float]) -> float:
    """log2 |R| - log2 rank, in bits, with NLLs in nats; R holds the secret and the others, the likeliest has rank 1.

    Carlini et al., section 4.2; R is a sample of all strings of the form, so the figure ends at log2 |R| (section 4.3
    extrapolates, which needs a distribution that is assumed). Equal likelihoods rank before the secret.
    """
    rank = 1 + sum(other <= secret for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)


def _same(char: str) -> str:
    return next((letters for letters in _SETS if char in letters), char)
