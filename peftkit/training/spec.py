"""How to train: the settings of an SFT run, and the memory presets."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from peftkit.config import Spec
from peftkit.training.layerwise import FreezeOutSpec, LayerwiseSpec, UnfreezeSpec
from peftkit.training.regularize.spec import RegularizeSpec

_WARMUP = 0.03


class TrainSpec(Spec):
    """Settings of supervised fine-tuning; names are those of transformers where it has one."""

    num_train_epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after so many optimizer steps, whatever the epochs say."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Stop before the step that would exceed so many training tokens."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate; None takes the one of the method that is trained."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "slanted_triangular"] = "cosine"
    """How the rate falls after warm-up; slanted_triangular is ULMFiT's, which rises in the first tenth of the run.
    With freezeout.t_0, cosine stands for that of each depth."""
    warmup_ratio: float = Field(default=_WARMUP, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero; not used by constant, slanted_triangular and freezeout."""
    layerwise: LayerwiseSpec = LayerwiseSpec()
    """Other rates for lower layers."""
    unfreeze: UnfreezeSpec = UnfreezeSpec()
    """Begin with some of the layers, and add the others bit by bit."""
    freezeout: FreezeOutSpec = FreezeOutSpec()
    """Freeze the lower layers before the upper ones."""
    per_device_train_batch_size: int = Field(default=8, gt=0)
    """Rows that go through the model at once."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Forward passes per optimizer step; a step sees this many times per_device_train_batch_size rows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpointed_blocks: int | None = Field(default=None, gt=0)
    """With gradient_checkpointing: recompute only so many blocks, the lowest that train; None recomputes all."""
    activation_offloading: bool = False
    """Keep activations in host memory between forward and backward pass: less GPU memory, more time; needs CUDA."""
    trunk_cache: bool = False
    """Compute what the frozen lower layers give once per row, keep it on the disk, and train the upper layers alone."""
    optim: Literal["auto", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "adamw_8bit", "sgd"] = "auto"
    """auto takes a paged 8-bit AdamW on CUDA over quantized weights, AdamW otherwise."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    eval_steps: int | None = Field(default=None, gt=0)
    """Measure the likelihood of the held-out rows after so many steps; None measures before and after training only."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """Stop after so many measurements in a row without a better one, and go on with the best; needs eval_steps.
    With unfreeze, those before the last thaw do not count."""
    save_steps: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; None makes ten in a run. Ctrl-C and the last step write one too."""
    save_total_limit: int = Field(default=2, gt=0)
    """Checkpoints kept: the last so many, and the best measured one."""
    report_to: list[str] = []
    """Trackers of transformers to send figures to; none by default."""
    regularize: RegularizeSpec = RegularizeSpec()
    """What is added against overfitting and forgetting; all of it is off by default."""
    seed: int = 0
    """Seed of data order and dropout."""

    @model_validator(mode="after")
    def _patience_needs_measurements(self) -> Self:
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience needs eval_steps: nothing is measured during training")
        return self

    @model_validator(mode="after")
    def _blocks_of_checkpointing(self) -> Self:
        if self.checkpointed_blocks and not self.gradient_checkpointing:
            raise ValueError("checkpointed_blocks needs gradient_checkpointing=true: nothing is recomputed without it")
        return self

    @model_validator(mode="after")
    def _a_cached_trunk_is_not_changed(self) -> Self:
        if self.trunk_cache and self.regularize.on_embeddings:
            name = f"regularize.{self.regularize.on_embeddings[0]}"
            raise ValueError(
                f"trunk_cache and {name} exclude each other: what lies below is computed once; set trunk_cache=false, "
                f"or remove {name}"
            )
        return self

    @model_validator(mode="after")
    def _freezeout_has_a_course_of_its_own(self) -> Self:
        # Set to their defaults they are taken without a word: the settings that a run keeps for --resume name all.
        mend: dict[str, str] = {}
        if self.unfreeze.direction != "none":
            mend[f"unfreeze.direction={self.unfreeze.direction}"] = self.unfreeze.off
        if self.lr_scheduler_type != "cosine":
            mend[f"lr_scheduler_type={self.lr_scheduler_type}"] = "train.lr_scheduler_type=cosine"
        if self.warmup_ratio not in (0, _WARMUP):
            mend[f"warmup_ratio={self.warmup_ratio}"] = f"train.warmup_ratio={_WARMUP}"
        if self.freezeout.t_0 is not None and mend:
            raise ValueError(
                f"freezeout.t_0 brings an order and rates of its own, and {' and '.join(mend)} would be ignored: set "
                + " ".join(mend.values())
            )
        return self

    @model_validator(mode="after")
    def _no_warmup_is_ignored(self) -> Self:
        if self.lr_scheduler_type == "slanted_triangular" and self.warmup_ratio != _WARMUP:
            raise ValueError(
                f"slanted_triangular warms up in the first tenth, and warmup_ratio={self.warmup_ratio} would be "
                f"ignored: set train.warmup_ratio={_WARMUP}, its default"
            )
        if self.lr_scheduler_type == "constant" and self.warmup_ratio not in (0, _WARMUP):
            raise ValueError(
                f"constant has no warm-up, and warmup_ratio={self.warmup_ratio} would be ignored: set "
                "train.lr_scheduler_type=constant_with_warmup or train.warmup_ratio=0"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        """The effective batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


# Sized by arithmetic, not yet run on such cards: with a vocabulary of 150,000 the logits of one training row of 1,024
# learned tokens, their float32 copy and gradients take about 2.2 GB, so that rows, not weights, fill a small card.
# By the memory of the device, not by model: what changes is how many rows and activations are alive at once. The
# effective batch is 16 in all of them, so the same recipe learns the same thing everywhere.
MEMORY_PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"quant.device": "cpu", "train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 2},
    "8gb": {
        "data.max_length": 1024,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 16,
        "train.gradient_checkpointing": True,
        "evaluate.batch_size": 4,
    },
    "12gb": {
        "data.max_length": 2048,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 16,
        "train.gradient_checkpointing": True,
        "evaluate.batch_size": 8,
    },
    "24gb": {
        "data.max_length": 2048,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 8,
        "train.gradient_checkpointing": True,
        "evaluate.batch_size": 16,
    },
}
