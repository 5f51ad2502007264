"""How many tokens of a step go through the model at once."""

from __future__ import annotations

import math

from peftkit.planning.setting import Setting

CPU_TOKENS = 512
"""On a CPU more tokens at once take more memory and no less time: docs/decisions/0017."""


def tokens_at_once(rows: int, longest: int, device: str) -> int:
    """The most tokens of a micro-batch, padding included: `rows` of the longest, on a CPU no more than CPU_TOKENS.

    One row goes through whole, however long it is. `device` is the type of a torch device.
    """
    whole = rows * longest
    return max(longest, min(whole, CPU_TOKENS)) if device == "cpu" else whole


def micro_batch_tokens(setting: Setting) -> int:
    """The most tokens of a setting's micro-batches, each row once."""
    return tokens_at_once(min(setting.micro_batch, setting.rows_per_step), setting.longest, setting.device)


def accumulates(setting: Setting) -> bool:
    """Whether a step of the longest rows takes more than one pass, and adds gradients to those of an earlier one."""
    return setting.rows_per_step * setting.longest > micro_batch_tokens(setting)


def labelled_tokens(setting: Setting) -> int:
    """Tokens of a micro-batch that the head scores, each row once."""
    return math.ceil(micro_batch_tokens(setting) * min(setting.labelled, setting.longest) / setting.longest)
