"""What measuring held-out rows and generating answers need besides weights."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from peftkit.planning.architecture import Architecture
from peftkit.planning.block import forward_pass
from peftkit.planning.layers import FLOAT32, SIZES
from peftkit.planning.ranges import Part, Range, exactly
from peftkit.planning.setting import Setting
from peftkit.planning.trained import trained

LOGITS_BYTES = 1 << 30
"""`generation.forward.LOGITS_BYTES`: batches whose logits would pass this are split; planning may not import it."""
BYTES_PER_LOGIT = 10
"""16-bit logits, their float32 copy and its log-softmax: what batches are split by."""


def evaluated_rows(architecture: Architecture, setting: Setting) -> int:
    """Rows that are measured at once."""
    bound = LOGITS_BYTES // (setting.evaluation_longest * architecture.vocabulary * BYTES_PER_LOGIT)
    return min(setting.evaluation_batch, max(1, bound))


def evaluation_logits(architecture: Architecture, setting: Setting) -> Part:
    """The head at the labelled positions of the held-out rows; `high` has a label at every position."""
    rows, length = evaluated_rows(architecture, setting), setting.evaluation_longest
    share = min(1.0, setting.labelled / setting.longest)
    size = SIZES[setting.compute_dtype]
    each = 2 * FLOAT32 if size == FLOAT32 else size + 2 * FLOAT32  # logits, in float32, and their log-softmax
    whole = rows * length * architecture.vocabulary * each
    formula = f"{rows} rows × {length:,} tokens × {architecture.vocabulary:,} × {each} B × labelled share"
    return Part("evaluation logits", Range(int(whole * share), int(whole * share), whole), formula)


def kv_cache(architecture: Architecture, setting: Setting) -> Part:
    """Keys and values of every layer for prompts and answers; sliding layers keep their window."""
    length = setting.evaluation_longest + setting.max_new_tokens
    per_token = f"{architecture.layers} layers × 2 × {architecture.keys} × {SIZES[setting.dtype]} B"
    formula = f"{setting.evaluation_batch} rows × {length:,} tokens × {per_token}"
    return Part("KV cache", exactly(_cached(architecture, setting, length)), formula)


def _cached(architecture: Architecture, setting: Setting, length: int) -> int:
    sliding = architecture.sliding_layers
    window = min(length, architecture.window) if sliding else 0
    tokens = (architecture.layers - sliding) * length + sliding * window
    return setting.evaluation_batch * tokens * 2 * architecture.keys * SIZES[setting.dtype]


@lru_cache(maxsize=512)
def _reading(architecture: Architecture, setting: Setting, rows: int) -> int:
    """The widest moment of the forward pass over the longest rows, in a block that is trained where one is."""
    blocks = trained(architecture, setting).blocks
    widest = max(range(len(blocks)), key=lambda index: (blocks[index].any, index))
    return forward_pass(architecture, setting, rows, setting.evaluation_longest, widest)


def reading(architecture: Architecture, setting: Setting, rows: int) -> int:
    """Bytes of the forward pass of so many of the longest held-out rows, without cache and head."""
    # Only what matters, so that settings that differ elsewhere share one answer.
    plain = replace(setting, optim="sgd", rows_per_step=1, micro_batch=1, gradient_checkpointing=False)
    plain = replace(plain, activation_offloading=False, double_quant=True, labelled=1, longest=1, lora_dropout=0.0)
    plain = replace(plain, evaluation_batch=1, max_new_tokens=1, starts=0, mixout=False, row_copies=1)
    return _reading(architecture, plain, rows)


def measuring(architecture: Architecture, setting: Setting) -> Range:
    """Bytes of the NLL of one batch of held-out rows."""
    rows = evaluated_rows(architecture, setting)
    return exactly(reading(architecture, setting, rows)).or_more(evaluation_logits(architecture, setting).bytes)


def generating(architecture: Architecture, setting: Setting) -> Range:
    """Bytes of answering one batch of prompts: reading them, or the last token with the whole cache."""
    size, batch = SIZES[setting.dtype], setting.evaluation_batch
    length = setting.evaluation_longest + setting.max_new_tokens
    prompts = _cached(architecture, setting, setting.evaluation_longest) + reading(architecture, setting, batch)
    # A cache grows by concatenation: one layer's keys are there twice; padded rows repeat keys and values per head.
    growing = batch * length * architecture.keys * size
    repeating = 2 * batch * length * architecture.queries * size
    logits = batch * architecture.vocabulary * (size + FLOAT32)
    cache = _cached(architecture, setting, length)
    last = Range(*(cache + max(logits, each) for each in (growing, growing, growing + repeating)))
    padded = prompts + 2 * batch * setting.evaluation_longest * architecture.queries * size
    return Range(prompts, prompts, padded).or_more(last)
