"""The adapter methods, one row each: name → PEFT configuration and the learning rate that suits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from peftkit.config import Spec


class AdapterSpec(Spec):
    """What is injected into the backbone."""

    method: Literal["lora", "rslora", "dora"] = "lora"
    """lora: scaling lora_alpha / r; rslora: lora_alpha / sqrt(r); dora: magnitude and direction apart."""
    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the update."""
    lora_alpha: float = Field(default=32, gt=0)
    """Numerator of the scaling."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """all-linear (every linear layer but the head), or a list of module name endings."""
    seed: int = 0
    """Seed of the initial lora_A."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    config: Callable[[AdapterSpec], dict[str, Any]]
    """Arguments of `peft.LoraConfig` that this method adds."""
    learning_rate: float
    """A starting point for a sweep, not a promise: QLoRA, table 9 (2e-4 for 7B and 13B)."""
    source: str


METHODS: dict[str, Method] = {
    "lora": Method(lambda spec: {}, 2e-4, "Hu et al. 2021, arXiv 2106.09685"),
    "rslora": Method(lambda spec: {"use_rslora": True}, 1e-4, "Kalajdzievski 2023, arXiv 2312.03732"),
    "dora": Method(lambda spec: {"use_dora": True}, 2e-4, "Liu et al. 2024, arXiv 2402.09353"),
}


def peft_arguments(spec: AdapterSpec) -> dict[str, Any]:
    """Keyword arguments for `peft.LoraConfig`."""
    return {
        "task_type": "CAUSAL_LM",
        "r": spec.r,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": spec.target_modules,
        **METHODS[spec.method].config(spec),
    }
