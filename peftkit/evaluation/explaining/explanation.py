"""One prediction with the words that it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peftkit.data.tasks.task import Prediction
from peftkit.evaluation.explaining.spec import Baseline
from peftkit.evaluation.explaining.words import Word
from peftkit.render import facts, number, table

_STRONGEST = 10


@dataclass(frozen=True)
class Explanation:
    """What a model says of a text, and each word's share of one of its scores."""

    what: str
    """Which score is explained, in words."""
    prediction: Prediction
    labels: tuple[str, ...]
    words: tuple[Word, ...]
    tokens: tuple[tuple[str, float], ...]
    """Every token as the tokenizer writes it, with its share."""
    score: float
    at_baseline: float
    """The score of the same sequence with all its text's tokens replaced by the baseline."""
    baseline: Baseline
    steps: int
    residual: float
    """Share of `score - at_baseline` that the words' shares miss; infinite where the two are equal and they do not."""

    @property
    def probabilities(self) -> dict[str, float]:
        """Of every label, where the head gives them; the most probable first."""
        found = dict(zip(self.labels, self.prediction.probabilities, strict=False))
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    @property
    def total(self) -> float:
        """The sum of the words' shares."""
        return math.fsum(word.value for word in self.words)

    def strongest(self, most: int = _STRONGEST) -> list[Word]:
        """The words with the largest shares of either sign; of equal ones the first."""
        return sorted(self.words, key=lambda word: -abs(word.value))[:most]

    def facts(self) -> list[tuple[str, str]]:
        """Everything but the words, as names and values."""
        value = self.prediction.value
        told = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = [f"{label} {number(share)}" for label, share in list(self.probabilities.items())[:_STRONGEST]]
        off = f"{number(100 * self.residual)} %" if math.isfinite(self.residual) else "all"
        change = f"{number(self.score)} - {number(self.at_baseline)} = {number(self.score - self.at_baseline)}"
        return [
            ("prediction", told or "none"),
            *([("probabilities", ", ".join(shown))] if shown else []),
            ("explained", self.what),
            ("score", f"{change} against the baseline {self.baseline!r}"),
            ("sum of words", f"{number(self.total)}, {off} off after {self.steps} steps"),
        ]

    def text(self) -> str:
        """Facts and the strongest words, for a terminal."""
        rows = [(word.text, word.part, f"{word.value:+.4g}") for word in self.strongest()]
        more = len(self.words) - len(rows)
        below = f"\nand {more:,} weaker words" if more else ""
        return f"{facts(self.facts())}\n\n{table(('word', 'of', 'share'), rows)}{below}"

    def record(self) -> dict[str, Any]:
        """Plain for JSON; a residual that is infinite is None."""
        value = self.prediction.value
        return {
            "prediction": list(value) if isinstance(value, tuple) else value,
            "confidence": self.prediction.confidence,
            "probabilities": self.probabilities,
            "explained": self.what,
            "score": self.score,
            "score_at_baseline": self.at_baseline,
            "baseline": self.baseline,
            "steps": self.steps,
            "sum": self.total,
            "residual": self.residual if math.isfinite(self.residual) else None,
            "words": [{"text": word.text, "part": word.part, "value": word.value} for word in self.words],
            "tokens": [{"token": token, "value": value} for token, value in self.tokens],
        }
