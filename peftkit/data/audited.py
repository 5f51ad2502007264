"""What every audit of a run's data leaves, whatever kind of rows it read, and how long a sequence may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from peftkit.data.findings.finding import Finding
from peftkit.data.findings.told import stopping
from peftkit.data.part import PartOf
from peftkit.events import Report, Warned, silent

P = TypeVar("P", bound=PartOf[Any, Any])


@dataclass(frozen=True, kw_only=True)
class AuditOf(Generic[P]):
    """The data of a run, ready to train on and to measure with."""

    train: P
    held_out: P
    overlap: float
    """Highest share of a held-out prompt's word 8-grams that occur anywhere in the training prompts."""
    findings: tuple[Finding, ...] = ()
    """What is wrong or worth knowing: errors first."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop a run."""
        return stopping(self.findings)

    @property
    def tokens(self) -> dict[str, Any]:
        """Tokens per sequence: counts between edges."""
        from peftkit.data.findings.lengths import histogram

        return histogram(self.train.examples, self.held_out.examples)

    def record(self) -> dict[str, Any]:
        """What `audit.json` of a run holds. Its excerpts come from the rows, so it stays in the run's folder."""
        return {
            "findings": [finding.record() for finding in self.findings],
            "tokens": self.tokens,
            "parts": [self.train.record(), self.held_out.record()],
            "overlap": self.overlap,
        }


def longest_allowed(max_length: int | None, limit: int | None, report: Report = silent) -> int | None:
    """Tokens of the longest sequence that is taken: data.max_length or the base's own limit, whichever is less."""
    if max_length and limit and max_length > limit:
        report(Warned(f"data.max_length={max_length} is above the base's longest sequence, so {limit} holds"))
    return min(filter(None, (max_length, limit)), default=None)
