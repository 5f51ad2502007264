"""The settings of a preference run's data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from peftkit.config import Spec
from peftkit.data.findings.rules import check_accepted
from peftkit.data.template import Rendering, Template, Think

Kind = Literal["pairs", "labelled"]


class PreferenceSpec(Spec):
    """What to learn from, and what to measure on. The loss falls on the final answer of each conversation alone."""

    kind: Kind = "pairs"
    """pairs: two answers to one prompt (dpo, orpo); labelled: one answer and whether it is wanted (kto). A file of
    pairs read as labelled gives two rows for each."""
    train: str | None = None
    """json, jsonl, csv, tsv or parquet file, or a Hub data set (`owner/name:split`)."""
    held_out: str | None = None
    """A file of rows that are never trained on; without it, `held_out_share` of the training file is set aside."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training file to set aside when no held-out file is given; rows of one prompt stay together."""
    think: Think = "keep"
    """Whether `<think>` blocks of answers are learned or removed."""
    template: Template = "base"
    """The base's own chat template, or plain text for bases without one."""
    template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, such as {enable_thinking: false}."""
    max_length: int | None = Field(default=None, gt=1)
    """Longest prompt with one answer in tokens; None takes the base's own limit."""
    too_long: Literal["raise", "drop"] = "raise"
    """What happens where either answer passes max_length. None is cut: an answer without its end is another answer."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on the first so many rows of the file only."""
    max_held_out_rows: int | None = Field(default=None, gt=0)
    """Measure on the first so many held-out rows only."""
    seed: int = 0
    """Seed of the split, and of which answers stand in for the policy's own in KTO's divergence."""
    accept: tuple[str, ...] = ()
    """Rules of the audit whose findings are meant so, such as [leak]; they are reported, and neither stop nor warn."""
    license: str | None = None
    """Licence of the rows, such as cc-by-4.0; it is kept with the adapter and stands on its model card."""

    @field_validator("accept")
    @classmethod
    def _known(cls, accept: tuple[str, ...]) -> tuple[str, ...]:
        return check_accepted(accept)

    @property
    def rendering(self) -> Rendering:
        """How rows become tokens."""
        return Rendering("last", self.think, self.template, self.template_kwargs)
