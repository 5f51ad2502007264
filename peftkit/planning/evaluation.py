"""What measuring held-out rows and generating answers need besides weights."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from peftkit.planning.architecture import Architecture
from peftkit.planning.block import forward_pass
from peftkit.planning.layers import FLOAT32, SIZES
from peftkit.planning.ranges import NOTHING, Part, Range, exactly
from peftkit.planning.setting import Setting
from peftkit.planning.trained import trained
from peftkit.planning.weights import weights

LOGITS_BYTES = 1 << 30
"""`generation.forward.LOGITS_BYTES`: batches whose logits would pass this are split; planning may not import it."""
BYTES_PER_LOGIT = 10
"""16-bit logits, their float32 copy and its log-softmax: what batches are split by."""
ANSWERS_PER_ROW = 3
"""`evaluation.held_out.ANSWERS_PER_ROW`: answers generated at once, for each row that is measured at once."""
PROMPT_TOKENS = 2048
"""`generation.limits.Limits.prompt_tokens`: tokens of prompts that are read in one pass."""
PREFIX_BYTES = 64 << 20
"""`generation.limits.Limits.prefix_bytes`: keys and values kept for prompts that begin alike."""
_ROUND = 64  # `generation.rows`: tokens that a row grows by


def evaluated_rows(architecture: Architecture, setting: Setting) -> int:
    """Rows that are measured at once."""
    bound = LOGITS_BYTES // (setting.evaluation_longest * architecture.outputs * BYTES_PER_LOGIT)
    return min(setting.evaluation_batch, max(1, bound))


def evaluation_logits(architecture: Architecture, setting: Setting) -> Part:
    """The head at the labelled positions of the held-out rows; `high` has a label at every position."""
    rows, length = evaluated_rows(architecture, setting), setting.evaluation_longest
    share = min(1.0, setting.labelled / setting.longest)
    size = SIZES[setting.compute_dtype]
    each = 2 * FLOAT32 if size == FLOAT32 else size + 2 * FLOAT32  # logits, in float32, and their log-softmax
    if architecture.task and architecture.task.pooled:
        each = size  # one token's of each row are picked before anything is made of them
    whole = rows * length * architecture.outputs * each
    formula = f"{rows} rows × {length:,} tokens × {architecture.outputs:,} × {each} B × labelled share"
    return Part("evaluation logits", Range(int(whole * share), int(whole * share), whole), formula)


def answered_rows(setting: Setting) -> int:
    """Answers that are generated at once."""
    return ANSWERS_PER_ROW * setting.evaluation_batch if setting.max_new_tokens else 0


def asked_base(architecture: Architecture, setting: Setting) -> Part:
    """The base once more, with its language head, and keys and values of the rows that it is asked.

    `low` has none of it: a base that cannot be asked in words is not loaded again.
    """
    bare = architecture.bare
    if not setting.asked_rows or bare is None:
        return Part("asked base", NOTHING, "")
    held = sum(part.bytes.expected for part in weights(bare, replace(setting, method="lora")))  # nothing of it trains
    cache = setting.asked_rows * _rounded(setting.asked_tokens) * _token(bare, setting)
    formula = f"the weights once more, and {setting.asked_rows} rows × {setting.asked_tokens:,} tokens"
    return Part("asked base", Range(0, held + cache, held + cache), formula)


def kv_cache(architecture: Architecture, setting: Setting) -> Part:
    """Keys and values of every layer for prompts and answers; each row has room for the longest."""
    rows, length = answered_rows(setting), setting.evaluation_longest + setting.max_new_tokens
    per_token = f"{architecture.layers} layers × 2 × {architecture.keys} × {SIZES[setting.dtype]} B"
    formula = f"{rows} rows × {_rounded(length):,} tokens × {per_token}"
    return Part("KV cache", exactly(_cached(architecture, setting, length)), formula)


def _cached(architecture: Architecture, setting: Setting, length: int) -> int:
    return answered_rows(setting) * _rounded(length) * _token(architecture, setting)


def _token(architecture: Architecture, setting: Setting) -> int:
    """Keys and values of one token."""
    return architecture.layers * 2 * architecture.keys * SIZES[setting.dtype]


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


@lru_cache(maxsize=512)
def _reading(architecture: Architecture, setting: Setting, rows: int) -> int:
    """The widest moment of the forward pass over the longest rows, in a block that is trained where one is."""
    blocks = trained(architecture, setting).blocks
    widest = max(range(len(blocks)), key=lambda index: (blocks[index].any, index))
    length = setting.evaluation_longest
    return forward_pass(architecture, setting, rows * length, length, widest)


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
    """Bytes of answering: some prompts being read beside a cache for all, or the last tokens with the whole cache."""
    size, rows = SIZES[setting.dtype], answered_rows(setting)
    if not rows:
        return NOTHING
    length = setting.evaluation_longest + setting.max_new_tokens
    read = min(rows, max(1, PROMPT_TOKENS // setting.evaluation_longest))
    prompts = _cached(architecture, setting, setting.evaluation_longest) + reading(architecture, setting, read)
    # Keys and values are repeated for each head that shares them, while several tokens of a row are read.
    repeated = 2 * read * setting.evaluation_longest * architecture.queries * size
    # A layer's keys are there twice while its rows grow.
    growing = rows * _rounded(length) * architecture.keys * size
    logits = rows * architecture.vocabulary * (size + FLOAT32)
    last = _cached(architecture, setting, length) + max(logits, growing)
    # What was read is kept for prompts that begin alike: the prompts, and at most the answers of as many rows again.
    kept = min(PREFIX_BYTES, rows * setting.evaluation_longest * _token(architecture, setting))
    most = min(PREFIX_BYTES, 2 * _cached(architecture, setting, length))
    return Range(prompts, prompts, prompts + repeated).or_more(exactly(last)) + Range(0, kept, most)
