"""The forward pass that training and evaluation share: the negative log-likelihood of labelled tokens.

Rows are padded on the right and the head is computed only for positions that some row of the batch has a label at.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from peftkit.data.chat import IGNORED

# Evaluation must not need more memory than training: 16 rows of 256 tokens over a vocabulary of 150,000 would be 6 GB.
LOGITS_BYTES = 1 << 30
_BYTES_PER_LOGIT = 10  # 16-bit logits, their float32 copy, and its log-softmax


class Labelled(Protocol):
    """A row with ids and labels, such as `data.chat.Example`."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...


def autocast(device: torch.device, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast for 16-bit compute, nothing for float32; training and evaluation run under the same one."""
    if compute_dtype == torch.float32:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = torch.autocast(device.type, dtype=compute_dtype)
    return context


def pad(rows: Sequence[Labelled], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each int64 of shape (rows, longest), padded on the right."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length] = torch.tensor(row.input_ids, dtype=torch.long)
        labels[i, :length] = torch.tensor(row.labels, dtype=torch.long)
        mask[i, :length] = 1
    return {
        "input_ids": ids.to(device, non_blocking=True),
        "attention_mask": mask.to(device, non_blocking=True),
        "labels": labels.to(device, non_blocking=True),
    }


def token_nll(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Negative log-likelihood in nats of every label, 0 where there is none; float32, shape (rows, longest - 1).

    Entry t belongs to the label at position t + 1, which the model predicts from the tokens up to t.
    """
    targets = batch["labels"][:, 1:]
    logits, wanted = label_logits(model, batch)
    if wanted.numel() == 0:
        return torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    nll = torch.zeros(targets.shape, dtype=precise.dtype, device=targets.device)
    kept = cross_entropy(precise.flatten(0, 1), targets[:, wanted].flatten(), ignore_index=IGNORED, reduction="none")
    # Out of place: autograd needs the graph from `kept` to the result.
    return nll.index_copy(1, wanted, kept.view(targets.shape[0], -1))


def label_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of shape (rows, n, vocabulary) at the n positions that some row has a label after, and these positions.

    They are those of `labels[:, 1:]`: position t predicts the label at t + 1. The model is called with all of `batch`
    but its labels.
    """
    wanted = (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    if wanted.numel() == 0:
        return torch.empty(batch["labels"].shape[0], 0, 0), wanted
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if _can_keep_some_logits(model):
        return model(**inputs, use_cache=False, logits_to_keep=wanted).logits, wanted
    return model(**inputs, use_cache=False).logits[:, wanted], wanted


def by_length(rows: Sequence[Labelled], size: int) -> list[list[int]]:
    """Indices of `rows` in batches of at most `size`, rows of similar length together: least padding."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def row_nll(
    model: Any, rows: Sequence[Labelled], *, pad_id: int, device: torch.device, batch_size: int = 8
) -> list[float]:
    """Summed answer NLL of every row in nats, in the order of `rows`."""
    sums = [0.0] * len(rows)
    with torch.inference_mode():
        for indices in bounded(by_length(rows, batch_size), rows, model):
            batch = pad([rows[i] for i in indices], pad_id, device)
            values = token_nll(model, batch).double().sum(dim=1).tolist()
            for index, value in zip(indices, values, strict=True):
                sums[index] = value
    return sums


def bounded(batches: list[list[int]], rows: Sequence[Labelled], model: Any) -> list[list[int]]:
    """Split batches whose logits would pass LOGITS_BYTES; a single row is never split."""
    vocabulary = model.config.get_text_config().vocab_size
    split = []
    for batch in batches:
        longest = max(len(rows[i].input_ids) for i in batch)
        size = max(1, LOGITS_BYTES // (longest * vocabulary * _BYTES_PER_LOGIT))
        split += [batch[start : start + size] for start in range(0, len(batch), size)]
    return split


def _can_keep_some_logits(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
