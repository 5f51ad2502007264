"""Rows one behind the other, without padding, as one row of a batch: every row still sees itself alone.

Positions begin anew at each row, and where rows begin travels with the call as `cu_seq_lens_q`, the name that
transformers' flash attention reads. Kernels without it get `by_row`, an attention function for transformers' registry
that goes through the rows one at a time. Masks of zeros and ones cannot leak then, because there are none: transformers
5.23 attends across rows without a word where `position_ids` meet a cache or a mask of ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftkit.data.chat import IGNORED
from peftkit.generation.forward import Labelled

BY_ROW = "peftkit_by_row"
_KERNEL = "sdpa"


def lay_flat(
    rows: Sequence[Labelled], device: torch.device, *, starts_on: torch.device | None = None
) -> dict[str, Any]:
    """input_ids, position_ids and labels, each int64 of shape (1, tokens), and where rows begin.

    Where rows begin is on the CPU, where `by_row` reads it in every layer, or on the device `starts_on`, where flash
    attention does. A row's first label is left out: the position before it belongs to another row.
    """
    lengths = [len(row.input_ids) for row in rows]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=starts_on)
    ids = [token for row in rows for token in row.input_ids]
    labels = [label for row in rows for label in (IGNORED, *row.labels[1:])]
    positions = [at for length in lengths for at in range(length)]
    batch: dict[str, Any] = {
        name: torch.tensor([values], dtype=torch.long).to(device, non_blocking=True)
        for name, values in (("input_ids", ids), ("position_ids", positions), ("labels", labels))
    }
    longest = max(lengths)
    return batch | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def place_of_starts(model: Any, device: torch.device) -> torch.device | None:
    """Where a transformers model on this device needs to know where rows begin; None for the CPU."""
    return None if model.config._attn_implementation in (_KERNEL, BY_ROW) else device


def attends_by_row(model: Any) -> bool:
    """Whether rows that lie flat cost a transformers model no more than they do one by one."""
    kernel: str = model.config._attn_implementation
    return kernel == _KERNEL or "flash" in kernel


@contextmanager
def attention_by_row(model: Any) -> Iterator[None]:
    """Let a transformers model with torch's fused kernel attend row by row to what `lay_flat` made.

    The backward pass belongs inside too: gradient checkpointing attends again there.
    """
    if model.config._attn_implementation != _KERNEL:  # flash attention reads `cu_seq_lens_q` itself
        yield
        return
    parts = {name: part for name in model.config.sub_configs if (part := getattr(model.config, name, None)) is not None}
    before = {"": _KERNEL, **{name: part._attn_implementation for name, part in parts.items()}}
    try:
        model.set_attn_implementation(BY_ROW)
        yield
    finally:
        model.set_attn_implementation(before if parts else _KERNEL)


def by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself: (1, heads, tokens, width) each gives (1, tokens, heads, width).

    Raises ValueError where the model does not pass on where rows begin, or a row is longer than a layer's window.
    """
    if cu_seq_lens_q is None:
        raise ValueError("the model does not tell its attention where rows begin")
    lengths = [end - begin for begin, end in pairwise(cu_seq_lens_q.tolist())]
    longest, window = max(lengths), options.get("sliding_window")
    if attention_mask is not None or (window is not None and longest > window):
        raise ValueError(f"rows of {longest} tokens with a mask or a window of {window} cannot be laid out flat")
    attend = ALL_ATTENTION_FUNCTIONS[_KERNEL]
    rows = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    pieces = [attend(module, *row, None, **options)[0] for row in rows]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)), None


ALL_ATTENTION_FUNCTIONS.register(BY_ROW, by_row)


def longest_flat(model: Any) -> int | None:
    """Tokens of the longest row that no layer's window or chunk would cut off; None where there is no limit."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
