"""A preference as the model gets it: one or two sequences that begin with the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit.data.chat import Example
from peftkit.data.part import PartOf
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
class PreferencePart(PartOf[PreferenceRow, PreferenceExample]):
    """Preferences of one role."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: each answer is one, with its prompt."""
        return max((len(each.input_ids) for example in self.examples for each in example.sequences), default=0)
