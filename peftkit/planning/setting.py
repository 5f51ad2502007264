"""What the memory, time and disk of a run depend on, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["lora", "rslora", "dora", "full"]


@dataclass(frozen=True)
class Setting:
    """One way to run: how the base is held, what is trained, and what is alive at once."""

    bits: Literal[4, 8, 16, 32] = 4
    """Bits per weight of the linear layers; 4 and 8 are bitsandbytes'."""
    double_quant: bool = True
    """Whether the constants of 4-bit blocks are quantized too."""
    compute_dtype: str = "bfloat16"
    """Dtype of matrix products: float32, bfloat16 or float16; 16 bits run under autocast."""
    dtype: str = "bfloat16"
    """Dtype of what is not quantized: embeddings, norms, head, and linear layers of 16 and 32 bits."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention kernel; eager keeps every score."""
    method: Method = "lora"
    """full trains every parameter of the base; the others train an adapter in float32."""
    r: int = 16
    """Rank of the adapter."""
    lora_dropout: float = 0.0
    """Above 0, a mask and a dropped copy of every adapted layer's input are kept."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear (every linear layer but the head), or endings of module names."""
    rows_per_step: int = 16
    """The effective batch, which no plan changes."""
    micro_batch: int = 1
    """Rows that go through the model at once in training."""
    gradient_checkpointing: bool = False
    """Only every block's input is kept, and its activations are computed again in the backward pass."""
    activation_offloading: bool = False
    """What the backward pass needs waits in host memory."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw_torch"
    """Optimizer; paged states may leave the device."""
    longest: int = 1024
    """Tokens of the longest training row."""
    labelled: int = 1024
    """Positions of the longest row that the head is computed for: those that some row of its batch has a label at."""
    evaluation_batch: int = 16
    """Rows that are measured at once."""
    evaluation_longest: int = 1024
    """Tokens of the longest held-out row, and of the longest prompt that is answered."""
    max_new_tokens: int = 128
    """Longest generated answer."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Kind of device; on a CPU the plan is that of the whole process."""
