"""Log-likelihoods of whole answers, with gradients: the sum over an answer's tokens, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from peftkit.generation.forward import token_nll
from peftkit.training.passes.head import Head, states_at_labels
from peftkit.training.passes.paths import Paths


def likelihoods(model: Any, batch: dict[str, Any], tokens: Sequence[int], paths: Paths) -> torch.Tensor:
    """Σ log p of each sequence's labelled tokens in nats; float32 (float64 of a float64 model), shape (sequences,).

    `batch` is what `Paths.laid` makes of the sequences, padded or flat, and `tokens` how many labels each has. With a
    known head no more than one chunk of logits exists at any time: the backward pass makes it again.
    """
    if paths.head is None:
        return -token_nll(model, batch).sum(dim=1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states, targets = states_at_labels(paths.head, model, inputs, batch["labels"], keeps_some=paths.keeps_some)
    chunks = zip(states.split(paths.head.rows), targets.split(paths.head.rows), strict=True)
    nll = torch.cat([checkpoint(_chunk, paths.head, *chunk, use_reentrant=False) for chunk in chunks])
    # Not index_add: on a GPU the order of its sums is not fixed, and a resumed run would round differently.
    return -torch.stack([part.sum() for part in nll.split(list(tokens))])


def _chunk(head: Head, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head.logits(states)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(precise, targets, reduction="none")
