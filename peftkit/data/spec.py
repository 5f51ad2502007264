"""The settings of a run's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.config import Spec
from peftkit.data.findings.rules import check_accepted
from peftkit.data.mixture import check_mixture
from peftkit.data.template import Loss, Rendering, Template, Think


class DataSpec(Spec):
    """What to learn from, and what to measure on."""

    train: str | None = None
    """json, jsonl, csv, tsv, parquet or txt file, or a Hub data set (`owner/name:split`)."""
    mixture: dict[str, float] = {}
    """Instead of train: several files or Hub sets with their weights, {a.jsonl: 3, b.jsonl: 1}; see `data.mixture.mix`.

    Without held_out, `held_out_share` of each set is set aside before they are mixed.
    """
    held_out: str | None = None
    """A file of rows that are never trained on; without it, `held_out_share` of the training file is set aside."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training file to set aside when no held-out file is given."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto"
    """auto looks at the columns of every row and says what it found."""
    loss: Loss = "assistant"
    """Where the loss falls: every assistant turn, only the last, or every token."""
    think: Think = "keep"
    """Whether `<think>` blocks of answers are learned or removed."""
    template: Template = "base"
    """The base's own chat template, or plain text for bases without one."""
    template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, such as {enable_thinking: false}."""
    max_length: int | None = Field(default=None, gt=1)
    """Longest sequence in tokens; None takes the base's own limit."""
    too_long: Literal["raise", "drop", "truncate", "split"] = "raise"
    """What happens to a row above max_length; split makes several sequences of a plain text, and loses no token."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on so many rows only."""
    draw: int | None = None
    """Seed by which max_train_rows are drawn; None takes the first so many."""
    max_held_out_rows: int | None = Field(default=None, gt=0)
    """Measure on the first so many held-out rows only."""
    seed: int = 0
    """Seed of the split."""
    against: str | None = None
    """A file of rows that must not be learned, such as a benchmark: training rows that hold one of them are found."""
    accept: tuple[str, ...] = ()
    """Rules of the audit whose findings are meant so, such as [leak]; they are reported, and neither stop nor warn."""
    cache: bool = True
    """Whether encoded rows and findings are kept in the cache folder, for runs after this one; no figure depends on it.

    Without it nothing is kept there, and nothing taken from it.
    """
    license: str | None = None
    """Licence of the rows, such as cc-by-4.0; it is kept with the adapter and stands on its model card."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        check_mixture(self.train, self.mixture)
        return self

    @field_validator("accept")
    @classmethod
    def _known(cls, accept: tuple[str, ...]) -> tuple[str, ...]:
        return check_accepted(accept)

    @property
    def rendering(self) -> Rendering:
        """How rows become tokens."""
        return Rendering(self.loss, self.think, self.template, self.template_kwargs)


def recorded_rendering(config: Mapping[str, Any]) -> Rendering:
    """How an adapter's training rendered its rows, from the settings in its manifest; the default where none stand."""
    data = config.get("data")
    given = data if isinstance(data, Mapping) else {}
    known = {key: given[key] for key in ("loss", "think", "template", "template_kwargs") if key in given}
    return DataSpec.model_validate(known).rendering
