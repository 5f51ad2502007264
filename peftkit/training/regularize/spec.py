"""Which regularizers a run has: all of them off by default, each a switch with its strength."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from peftkit.config import Spec


class RegularizeSpec(Spec):
    """Regularizers of a training run. The loss that is shown stays the NLL, whatever is added to it."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """ε of (1 - ε) · CE + ε · mean(-log p), for every answer token (arXiv 1512.00567)."""
    l1: float = Field(default=0.0, ge=0)
    """λ of λ · Σ|w| over the trained matrices, added to the mean loss of a step; vectors and scales are left alone."""
    l2: float = Field(default=0.0, ge=0)
    """λ of ½ · λ · Σw² over the same. Unlike weight_decay it passes through the optimizer, which AdamW would scale."""
    l2_sp: float = Field(default=0.0, ge=0)
    """α of ½ · α · ‖w - w⁰‖², where w⁰ is where the run started (arXiv 1802.01483)."""
    mixout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a number of a trained matrix is, for one pass, the one the run started with (1909.11299)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of the base while it is trained; None leaves its own. An adapter's is adapter.lora_dropout."""
    r_drop: float = Field(default=0.0, ge=0)
    """α of α · ½ · [KL(p₁‖p₂) + KL(p₂‖p₁)], added to the mean of two dropout passes' losses (arXiv 2106.14448)."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """α of the noise U(-1, 1) · α / √(L · d) on a row of L embedded tokens of width d (arXiv 2310.05914)."""
    adversarial: Literal["none", "fgm", "freelb"] = "none"
    """Train on worst-case embeddings: one ascent step (arXiv 1605.07725), or several from a random one (1909.11764)."""
    adversarial_epsilon: float | None = Field(default=None, gt=0)
    """Largest Frobenius norm of a row's perturbation, in the units of the base's embeddings."""
    adversarial_steps: int | None = Field(default=None, gt=0)
    """Passes of freelb, each with 1/steps of the gradient; the paper takes 2 to 5."""
    adversarial_step_size: float | None = Field(default=None, ge=0)
    """Norm of one ascent step of freelb."""

    @model_validator(mode="after")
    def _adversarial_is_complete(self) -> Self:
        wanted = {"none": (), "fgm": ("epsilon",), "freelb": ("epsilon", "steps", "step_size")}[self.adversarial]
        for name in ("epsilon", "steps", "step_size"):
            given = getattr(self, f"adversarial_{name}") is not None
            if given and name not in wanted:
                raise ValueError(f"adversarial={self.adversarial} does not use adversarial_{name}")
            if name in wanted and not given:
                raise ValueError(f"adversarial={self.adversarial} needs adversarial_{name}: no value suits every base")
        return self

    @model_validator(mode="after")
    def _nothing_perturbs_the_perturbed(self) -> Self:
        if self.adversarial != "none" and self.r_drop:
            raise ValueError(
                f"adversarial={self.adversarial} and r_drop exclude each other: the ascent would follow the difference "
                "of two dropout draws"
            )
        if self.adversarial != "none" and self.neftune_alpha:
            raise ValueError(
                f"adversarial={self.adversarial} and neftune_alpha exclude each other: both perturb the embeddings, "
                "and noise would push the perturbation out of adversarial_epsilon"
            )
        return self

    @property
    def on_embeddings(self) -> tuple[str, ...]:
        """The settings in force that change what the base's first layer is given."""
        return (("neftune_alpha",) if self.neftune_alpha else ()) + (
            ("adversarial",) if self.adversarial != "none" else ()
        )

    @property
    def active(self) -> tuple[str, ...]:
        """The regularizers in force."""
        defaults = type(self)()
        names = (n for n in type(self).model_fields if not n.startswith("adversarial_"))
        return tuple(name for name in names if getattr(self, name) != getattr(defaults, name))
