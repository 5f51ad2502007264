"""Settings of what trains when and how fast, by depth: embeddings, blocks, head (`peftkit.tuning.depth`)."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from peftkit.config import Spec

_KEY = re.compile(r"embeddings|head|(\d+)(?:-(\d+))?")


class LayerwiseSpec(Spec):
    """Rates by depth: one factor (Howard and Ruder 2018, arXiv 1801.06146, section 3.2), or a table."""

    decay: float | None = Field(default=None, gt=0, le=1)
    """The highest trained depth has the learning rate, and every one below it this times that of the one above."""
    rates: dict[str, float] = {}
    """What learning_rate is multiplied by, for embeddings, head, and blocks such as "3" or "0-9"."""

    @field_validator("rates")
    @classmethod
    def _known_depths(cls, rates: dict[str, float]) -> dict[str, float]:
        for key, value in rates.items():
            blocks_named(key)
            if value <= 0:
                raise ValueError(f"the rate of {key} must be above 0, got {value:g}")
        return rates

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.decay is not None and self.rates:
            raise ValueError(
                f"decay={self.decay:g} and rates are two ways to say the same: set train.layerwise.decay=null or "
                "train.layerwise.rates={}"
            )
        return self


class UnfreezeSpec(Spec):
    """Gradual unfreezing: start with one end of the model, and add a part after every so many epochs or steps."""

    selector: ClassVar[str] = "direction"

    direction: Literal["none", "deep_first", "shallow_first"] = "none"
    """deep_first: the head, then the blocks downwards, the embeddings last (ULMFiT); shallow_first: the other way."""
    every_epochs: float | None = Field(default=None, gt=0)
    """Epochs between two thaws."""
    every_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps between two thaws."""
    groups: int = Field(default=1, gt=0)
    """Depths (embeddings, a block, the head) that begin together; those without trained tensors do not count."""

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        paces = sum(value is not None for value in (self.every_epochs, self.every_steps))
        if self.direction == "none" and (paces or self.groups != 1):
            raise ValueError(f"nothing is unfrozen without a direction: set deep_first or shallow_first, or {self.off}")
        if self.direction != "none" and paces == 0:
            raise ValueError(
                f"direction={self.direction} needs train.unfreeze.every_epochs or train.unfreeze.every_steps"
            )
        if paces == 2:
            both = f"every_epochs={self.every_epochs:g} and every_steps={self.every_steps}"
            raise ValueError(
                f"{both} are two paces: set train.unfreeze.every_epochs=null or train.unfreeze.every_steps=null"
            )
        return self

    @property
    def off(self) -> str:
        """The overrides that take back what is set here."""
        mend = {"direction": "none", "every_epochs": "null", "every_steps": "null", "groups": "1"}
        default = type(self).model_fields
        return " ".join(f"train.unfreeze.{k}={v}" for k, v in mend.items() if getattr(self, k) != default[k].default)


class FreezeOutSpec(Spec):
    """FreezeOut: each depth's rate falls to 0 along a cosine of its own, and then it is frozen.

    Brock et al. 2017, arXiv 1706.04983, and its code; the formula in the README of that code lacks a factor of one
    half. The cosine stands in for train.lr_scheduler_type, which stays at its default, and there is no warm-up.
    """

    t_0: float | None = Field(default=None, gt=0, le=1)
    """Share of the run after which the lowest trained depth is frozen; it grows evenly to 1 for the highest."""
    cubed: bool = False
    """Take the third power of those shares, that of t_0 too: most depths are frozen earlier."""
    scaled: bool = False
    """Divide each depth's rate by its share, so that the rates of all add up to the same."""

    @model_validator(mode="after")
    def _nothing_without_t_0(self) -> Self:
        if self.t_0 is None and (self.cubed or self.scaled):
            raise ValueError("cubed and scaled belong to a t_0")
        return self


def blocks_named(key: str) -> range | None:
    """Indices of the blocks that a key of a table names; None for embeddings and head. Raises ValueError."""
    match = _KEY.fullmatch(key)
    first, last = (int(match[1]), int(match[2] or match[1])) if match and match[1] else (0, 0)
    if match is None or first > last:
        raise ValueError(f'{key!r} names no depth: embeddings, head, or blocks such as "3" or "0-9"')
    return range(first, last + 1) if match[1] else None
