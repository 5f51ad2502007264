"""A model's logits at the answer tokens of rows, row by row, in chunks that bound the memory they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.data.chat import IGNORED, Example
from peftkit.errors import DeltaError
from peftkit.generation.forward import autocast, bounded, by_length, label_logits, pad


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and where and how it computes."""

    model: Any
    device: torch.device
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class Answer:
    """The logits of one row's answer tokens."""

    index: int
    """Of the row in the given sequence."""
    logits: torch.Tensor
    """float32 (float64 where the model is), shape (answer tokens, vocabulary), on the model's device."""
    targets: torch.Tensor
    """int64, shape (answer tokens,)."""


def answers(loaded: Loaded, rows: Sequence[Example], *, pad_id: int, batch_size: int = 8) -> Iterator[Answer]:
    """Logits of every row's answer tokens, rows of similar length first; each row once.

    Batches are those of `generation.forward.row_nll`, so their logits stay below its LOGITS_BYTES. Raises DeltaError
    when the model gives a logit that is not finite.
    """
    with torch.inference_mode(), autocast(loaded.device, loaded.compute_dtype):
        for indices in bounded(by_length(rows, batch_size), rows, loaded.model):
            batch = pad([rows[i] for i in indices], pad_id, loaded.device)
            logits, wanted = label_logits(loaded.model, batch)
            targets = batch["labels"][:, 1:][:, wanted]
            for place, index in enumerate(indices):
                own = targets[place] != IGNORED
                found = logits[place, own]
                found = found if found.dtype == torch.float64 else found.float()
                _check_finite(found, rows[index])
                yield Answer(index, found, targets[place, own])


def _check_finite(logits: torch.Tensor, row: Example) -> None:
    bad = int((~torch.isfinite(logits)).any(dim=1).sum())
    if bad:
        raise DeltaError(
            f"the model gives NaN or infinite logits at {bad} of {logits.shape[0]} answer tokens of {row.where}",
            expected="finite logits",
            hint="the weights may have overflowed their dtype: write bfloat16 or float32 instead of float16",
        )
