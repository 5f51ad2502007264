"""A preference as the model gets it: one or two sequences that begin with the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data.chat import Example
from peftkit.data.part import Role
from peftkit.data.preference.rows import PreferenceRow


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt, or one answer and whether it is wanted; the loss falls on answers alone."""

    chosen: Example
    """The better answer; of a labelled row its only one, wanted or not."""
    rejected: Example | None = None
    """The worse answer, None in a labelled row."""
    desirable: bool | None = None
    """Whether the answer of a labelled row is wanted, None in a pair."""
    mismatched: Example | None = None
    """A labelled row's prompt with an answer to another prompt: what KTO estimates its divergence from."""
    reference: tuple[float, ...] = ()
    """Log-likelihoods of the answers under the base, in nats: chosen and rejected, or the answer and the mismatched
    one. Empty until they are measured, once, before training."""
    divergence: float | None = None
    """KTO: what the answer's log-ratio is compared with in this step, in nats; None before the step has measured it."""

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What goes through the model with gradients."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)

    @property
    def input_ids(self) -> list[int]:
        """The ids of all sequences, one behind the other: what the row costs."""
        return [token for sequence in self.sequences for token in sequence.input_ids]

    @property
    def labels(self) -> list[int]:
        """The labels of `input_ids`."""
        return [label for sequence in self.sequences for label in sequence.labels]

    @property
    def prompt_ids(self) -> list[int]:
        """What inference feeds before either answer."""
        return self.chosen.prompt_ids

    @property
    def answer_tokens(self) -> int:
        """Answer tokens of all sequences."""
        return sum(sequence.answer_tokens for sequence in self.sequences)

    @property
    def stop_added(self) -> bool:
        """Whether an answer got an end-of-turn token that the template did not write."""
        return any(sequence.stop_added for sequence in self.sequences)

    @property
    def row(self) -> int:
        """Index of the row it comes from."""
        return self.chosen.row

    @property
    def where(self) -> str:
        """File and line."""
        return self.chosen.where


@dataclass(frozen=True)
class PreferencePart:
    """Encoded rows of one role; what `data.part.Part` is for conversations."""

    role: Role
    source: str
    sha256: str
    rows: tuple[PreferenceRow, ...]
    examples: tuple[PreferenceExample, ...]
    dropped: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    license: str | None = None

    @property
    def tokens(self) -> int:
        """All tokens of all sequences."""
        return sum(len(sequence.input_ids) for example in self.examples for sequence in example.sequences)

    @property
    def answer_tokens(self) -> int:
        """Tokens the loss falls on."""
        return sum(example.answer_tokens for example in self.examples)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: digests and counts, no rows."""
        return {
            "role": self.role,
            "source": Path(self.source).name,
            "sha256": self.sha256,
            "rows": len(self.rows),
            "tokens": self.tokens,
            "dropped": len(self.dropped),
            "license": self.license,
        }
