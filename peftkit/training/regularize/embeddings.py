"""Changes to what the base's first layer is given: the output of the input embeddings, in training passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftkit.errors import TrainingError

Change = Callable[[torch.Tensor], torch.Tensor]
"""From embeddings (rows, longest, width) to changed ones."""


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    """Let `change` act on the embedded tokens of the one forward pass inside.

    Raises TrainingError when the model embedded its input never or more than once: the change would not be in force.
    """
    calls = 0

    def hook(module: torch.nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return change(output)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise TrainingError(
            f"{type(model).__name__} called its input embeddings {calls} times in one pass",
            expected="once, so that they can be perturbed",
            hint="remove train.regularize.neftune_alpha and train.regularize.adversarial",
        )


def tokens_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """1.0 at every token and 0.0 at padding, float32 of shape (rows, longest, 1)."""
    return batch["attention_mask"][..., None].float()


def neftune(tokens: torch.Tensor, alpha: float) -> Change:
    """Noise U(-1, 1) · α / √(L · d) on every token: variance α² / (3Ld) each, E‖noise‖² = α² / 3 a row.

    L is a row's own number of tokens: transformers' hook takes the padded length and adds noise to padding, so that a
    row's noise depends on its neighbours. Jain et al. 2023 (arXiv 2310.05914), algorithm 1.
    """

    def change(embedded: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
        noise *= alpha / torch.sqrt(tokens.sum(dim=1, keepdim=True) * embedded.shape[-1]) * tokens
        return embedded + noise.to(embedded.dtype)

    return change


def width_of(model: Any, input_ids: torch.Tensor) -> int:
    """Numbers per embedded token."""
    with torch.no_grad():
        return int(model.get_input_embeddings()(input_ids[:1, :1]).shape[-1])
