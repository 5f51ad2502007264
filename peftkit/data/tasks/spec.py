"""The settings of a classic task's data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from peftkit.config import Spec
from peftkit.data.augment import AugmentSpec
from peftkit.data.findings.rules import check_accepted
from peftkit.data.mixture import check_mixture
from peftkit.data.tasks.task import TaskName


class TaskSpec(Spec):
    """What to learn from, and what to measure on."""

    task: TaskName
    """Set by the recipe."""
    train: str | None = None
    """json, jsonl, csv, tsv or parquet; CoNLL for tokens, SQuAD's JSON for questions, a folder of folders of images."""
    mixture: dict[str, float] = {}
    """Instead of train: several files with their weights, {a.csv: 3, b.csv: 1}; see `data.mixture.mix`.

    Without held_out, `held_out_share` of each set is set aside before they are mixed.
    """
    held_out: str | None = None
    """Rows that are never trained on; without it, `held_out_share` of the training rows is set aside."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows to set aside when no held-out file is given."""
    text: str | None = None
    """Column of the text, the context or the source; None finds it among the usual names, and says which."""
    pair: str | None = None
    """Column of the second text or the question."""
    label: str | None = None
    """Column of the label, the number, the tags, the answers or the target text."""
    columns: tuple[str, ...] = ()
    """Names of a csv's columns, for a file without a header line."""
    multi_label: bool = False
    """text_classification: a row may have several labels, or none."""
    separator: str = ";"
    """What stands between the labels of a row where they are one text."""
    max_length: int | None = Field(default=None, gt=1)
    """Longest sequence in tokens; None takes the base's own limit."""
    too_long: Literal["raise", "drop", "truncate", "windows"] | None = None
    """What happens to a longer row; None is windows for tokens and questions, which lose nothing, else raise."""
    stride: int = Field(default=64, ge=0)
    """Tokens that two neighbouring windows share."""
    balance: bool = False
    """With max_train_rows: take the same number of rows of every label."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on so many rows, drawn with `draw`."""
    draw: int = 0
    """Seed of the draw of training rows."""
    max_held_out_rows: int | None = Field(default=None, gt=0)
    """Measure on so many held-out rows, drawn with a seed of their own: the same for every training draw."""
    instruction: str | None = None
    """translation, summarization on a base that chats: what is asked of it before the text."""
    seed: int = 0
    """Seed of the split."""
    augment: AugmentSpec = AugmentSpec()
    """Edited copies of the training rows; none by default."""
    accept: tuple[str, ...] = ()
    """Rules of the audit whose findings are meant so, such as [leak]; they are reported, and neither stop nor warn."""
    license: str | None = None
    """Licence of the rows, such as cc-by-4.0; it is kept with the adapter and stands on its model card."""

    @field_validator("accept")
    @classmethod
    def _known(cls, accept: tuple[str, ...]) -> tuple[str, ...]:
        return check_accepted(accept)

    @model_validator(mode="after")
    def _one_source(self) -> TaskSpec:
        check_mixture(self.train, self.mixture)
        return self
