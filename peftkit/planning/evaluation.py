"""What measuring held-out rows and generating answers need besides weights."""

from __future__ import annotations

from peftkit.planning.architecture import Architecture
from peftkit.planning.layers import FLOAT32, SIZES
from peftkit.planning.ranges import Part, Range, exactly
from peftkit.planning.setting import Setting

LOGITS_BYTES = 1 << 30
"""`generation.forward.LOGITS_BYTES`: batches whose logits would pass this are split; planning may not import it."""
BYTES_PER_LOGIT = 10
"""16-bit logits, their float32 copy and its log-softmax."""


def evaluated_rows(architecture: Architecture, setting: Setting) -> int:
    """Rows that are measured at once."""
    bound = LOGITS_BYTES // (setting.evaluation_longest * architecture.vocabulary * BYTES_PER_LOGIT)
    return min(setting.evaluation_batch, max(1, bound))


def evaluation_logits(architecture: Architecture, setting: Setting) -> Part:
    """The head at the labelled positions of the held-out rows; `high` has a label at every position."""
    rows, length = evaluated_rows(architecture, setting), setting.evaluation_longest
    share = min(1.0, setting.labelled / setting.longest)
    whole = rows * length * architecture.vocabulary * BYTES_PER_LOGIT
    formula = f"{rows} rows × {length:,} tokens × {architecture.vocabulary:,} × {BYTES_PER_LOGIT} B × labelled share"
    return Part("evaluation logits", Range(int(whole * share), int(whole * share), whole), formula)


def kv_cache(architecture: Architecture, setting: Setting) -> Part:
    """Keys and values of every layer for prompts and answers; sliding layers keep their window."""
    size, length = SIZES[setting.dtype], setting.evaluation_longest + setting.max_new_tokens
    sliding = architecture.sliding_layers
    window = min(length, architecture.window) if sliding else 0
    tokens = (architecture.layers - sliding) * length + sliding * window
    total = setting.evaluation_batch * tokens * 2 * architecture.keys * size
    per_token = f"{architecture.layers} layers × 2 × {architecture.keys} × {size} B"
    formula = f"{setting.evaluation_batch} rows × {length:,} tokens × {per_token}"
    return Part("KV cache", exactly(total), formula)


def forward_scratch(architecture: Architecture, setting: Setting, tokens: int) -> int:
    """The widest moment of a block's forward pass without a backward one: the MLP, its input and the residual."""
    size = SIZES[setting.compute_dtype]
    experts = architecture.experts
    inner = architecture.intermediate if experts is None else experts.per_token * experts.intermediate + experts.shared
    wide = (3 if architecture.family.gated else 2) * inner * size
    adapted = inner * FLOAT32 if setting.method != "full" and size < FLOAT32 else 0
    return tokens * (wide + adapted + 3 * architecture.hidden * SIZES[setting.dtype])


def measuring(architecture: Architecture, setting: Setting) -> Range:
    """Bytes of the NLL of one batch of held-out rows."""
    tokens = evaluated_rows(architecture, setting) * setting.evaluation_longest
    block = exactly(forward_scratch(architecture, setting, tokens))
    resting = exactly(tokens * architecture.hidden * SIZES[setting.dtype])
    return block.or_more(evaluation_logits(architecture, setting).bytes + resting)


def generating(architecture: Architecture, setting: Setting) -> Range:
    """Bytes of answering one batch of prompts: the cache, and reading the prompts or growing one layer's cache."""
    cache = kv_cache(architecture, setting).bytes
    reading = forward_scratch(architecture, setting, setting.evaluation_batch * setting.evaluation_longest)
    # A cache grows by concatenation: one layer's keys and values are there twice; masked rows repeat them per head.
    length = setting.evaluation_longest + setting.max_new_tokens
    growing = 2 * setting.evaluation_batch * length * architecture.queries * SIZES[setting.dtype]
    heads = setting.evaluation_batch * architecture.vocabulary * (SIZES[setting.dtype] + FLOAT32)
    return cache + Range(max(reading, growing), max(reading, growing) + heads, reading + growing + heads)
