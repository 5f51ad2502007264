"""How to train on preferences: the settings of supervised training, and those of the loss."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from peftkit.training.spec import TrainSpec

PreferenceLoss = Literal["dpo", "orpo", "kto"]


class PreferenceTrainSpec(TrainSpec):
    """Settings of preference training; names are those of TRL where it has one."""

    loss: PreferenceLoss = "dpo"
    """dpo: pairs against the base (arXiv 2305.18290); orpo: pairs without a reference (2403.07691); kto: single answers
    that are wanted or not (2402.01306)."""
    beta: float = Field(default=0.1, gt=0)
    """dpo, kto: how far the adapter may go from the base, more is less far (ipo: its τ); orpo: weight λ of the odds."""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """dpo: the loss of a pair's margin. robust is for labels of which some are flipped (2403.00409), hinge is SLiC's
    (2305.10425), ipo is 2310.12036 with log-ratios per token, as TRL has it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """robust: the share of labels that are flipped."""
    sft_weight: float = Field(default=0.0, ge=0)
    """dpo: weight of the better answer's NLL per token, as in RPO (2404.19733)."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of wanted answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of unwanted answers."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        own = {"loss_type": "dpo", "label_smoothing": "dpo", "sft_weight": "dpo", "desirable_weight": "kto",
               "undesirable_weight": "kto"}  # fmt: skip
        fields = PreferenceTrainSpec.model_fields
        for name, loss in own.items():
            if self.loss != loss and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is a setting of {loss}, and loss={self.loss} would ignore it: remove {name}")
        if (self.loss_type == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} and loss_type={self.loss_type}: loss_type=robust needs "
                "label_smoothing above 0, and no other reads it; set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _what_does_not_go_with_preferences(self) -> Self:
        regularize = self.regularize
        refused = [
            *(["trunk_cache"] if self.trunk_cache else []),
            *(["regularize.label_smoothing"] if regularize.label_smoothing else []),
            *(["regularize.r_drop"] if regularize.r_drop else []),
            *(f"regularize.{name}" for name in regularize.on_embeddings),
        ]
        if refused:
            raise ValueError(
                f"{', '.join(refused)} would change the log-likelihoods that preferences compare: remove it"
            )
        return self

    @property
    def compares_with_base(self) -> bool:
        """Whether the loss reads log-likelihoods under the base."""
        return self.loss != "orpo"
