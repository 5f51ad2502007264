"""What the memory, time and disk of a run depend on, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "lora", "rslora", "dora", "lora_plus", "pissa", "loftq", "eva", "adalora", "ia3", "vera", "loha", "lokr", "oft",
    "prompt_tuning", "prefix_tuning", "trainable_tokens", "full", "top_layers", "bias_only", "norms", "patterns",
]  # fmt: skip
PARTIAL: frozenset[str] = frozenset({"full", "top_layers", "bias_only", "norms", "patterns"})
"""Methods that train tensors of the base itself."""
PROMPTS: frozenset[str] = frozenset({"prompt_tuning", "prefix_tuning", "trainable_tokens"})
"""Methods that train what the blocks read."""


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
    """What is trained: an adapter in float32, or float32 copies of the base's own tensors."""
    in_place: bool = False
    """full only: the weights themselves are trained, in `dtype`, and nothing is beside them. So do other tools."""
    layers: Literal["all"] | tuple[int, ...] = "all"
    """Blocks that an adapter, norms or bias_only touch; only with `all` norms and biases outside of them."""
    top_layers: int = 0
    """top_layers: how many of the last blocks are trained."""
    train_head: bool = True
    """top_layers: whether the final norm and the head are trained too."""
    patterns: tuple[str, ...] = ()
    """patterns: names of the base's tensors, with wildcards."""
    r: int = 16
    """Rank of the adapter; of adalora, the rank that it begins with."""
    oft_block_size: int = 32
    """oft: rows that one rotation turns together."""
    decompose_factor: int = -1
    """lokr: size of the small Kronecker factor; -1 makes both as square as possible."""
    num_virtual_tokens: int = 0
    """prompt_tuning, prefix_tuning: tokens before every input."""
    trained_tokens: int = 0
    """How many rows of the embedding are trained: by trainable_tokens, or beside LoRA."""
    feedforward_modules: tuple[str, ...] = ()
    """ia3: the layers among `target_modules` whose inputs are scaled; with `auto` it is the MLP's last."""
    lora_dropout: float = 0.0
    """Above 0, a mask and a dropped copy of every adapted layer's input are kept."""
    target_modules: Literal["all-linear", "auto"] | tuple[str, ...] = "all-linear"
    """all-linear (every linear layer but the head), auto (ia3's own choice), or endings of module names."""
    rows_per_step: int = 16
    """The effective batch, which no plan changes."""
    row_copies: int = 1
    """How often every row of a micro-batch goes through the model at once: twice with R-Drop."""
    starts: int = 0
    """Copies of the trained tensors as they were at the start: L2-SP and mixout hold one."""
    mixout: bool = False
    """Every pass computes with mixtures of the trained matrices and those of the start."""
    trunk_cache: bool = False
    """What lies below the lowest trained tensor runs once per row, is kept on the disk, and is not in memory later."""
    compares_answers: bool = False
    """Preferences: the loss reads likelihoods of whole answers, and both answers of a pair are one row."""
    micro_batch: int = 1
    """So many of the longest rows go through the model at once: `tokens.micro_batch_tokens` says how many tokens."""
    passes: Literal["plain", "padded", "flat"] = "flat"
    """flat: the shortcuts of `passes.Passes` where the base and the rest of the setting allow; padded: the same with
    rows side by side, which noise on embeddings needs; plain: none, as other tools train."""
    gradient_checkpointing: bool = False
    """Only every block's input is kept, and its activations are computed again in the backward pass."""
    checkpointed_blocks: int | None = None
    """With checkpointing: only so many blocks are computed again, the lowest that train; None: all."""
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
    """Longest generated answer; 0 where none is generated."""
    compared_at_once: int = 0
    """Preferences that are measured in mid-run: sequences of a row that are read at once, two of a pair."""
    asked_rows: int = 0
    """Under a task's head: rows that the base is asked in words, loaded once more for it with its language head."""
    asked_tokens: int = 0
    """Tokens of such a row: solved rows, question and answer."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Kind of device; on a CPU the plan is that of the whole process."""
