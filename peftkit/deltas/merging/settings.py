"""What a merge is asked to write."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.config import Spec

Onto = Literal["original", "dequantized"]


class MergeSettings(Spec):
    """Onto which weights, and into which format."""

    onto: Onto
    """original: the base's files as they are; dequantized: what a quantized backbone computed with in training."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Of all float tensors; keep leaves each as the base has it."""
    shard_size: int = Field(default=5_000_000_000, ge=1)
    """Bytes of tensors in one file; a larger tensor gets a file of its own."""
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    """Write the linear layers in few bits, as a bitsandbytes upload."""
    double_quant: bool = True
    """nf4 and fp4: hold the blocks' constants in 8 bits."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To few bits: stochastic keeps deltas that are smaller than the steps of the format, on average."""
    seed: int = 0
    """Of stochastic rounding."""
    force: bool = False
    """Publish a result that keeps less than 90 % of the delta too."""
