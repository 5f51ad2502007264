"""Ways to multiply tokens by the factors of their adapters, timed alone for one decode step: `serving.py` runs them.

Sixteen tokens of 1, 4 or 16 adapters of rank 16, and the shapes of the embedded base's layers. Each way goes through 30
layers in turn, so that factors come from memory as they do in a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TOKENS, RANK, LAYERS = 16, 16, 30
SHAPES = ((576, 576), (576, 1536), (1536, 576))
Act = Callable[[int], Any]
"""Does one layer."""


def ways(distinct: int, inputs: int, outputs: int) -> dict[str, Act]:
    """Each way by name; all but the first give x · Aᵀ · Bᵀ of each token's adapter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) for _ in range(LAYERS)]

    each = TOKENS // distinct
    weights, a, b = normal(outputs, inputs), normal(distinct, RANK, inputs), normal(distinct, RANK, outputs)
    x, token_slots = normal(TOKENS, inputs)[0], torch.arange(TOKENS) // each
    grouped, mask = x.view(distinct, each, inputs), torch.zeros(TOKENS, distinct, RANK)
    mask[torch.arange(TOKENS), token_slots] = 1
    wide, ends = mask.view(TOKENS, -1), torch.arange(each, TOKENS + 1, each, dtype=torch.int32)

    def masked(layer: int) -> torch.Tensor:
        return (x @ a[layer].view(-1, inputs).T * wide) @ b[layer].view(-1, outputs)

    def contiguous(layer: int) -> torch.Tensor:
        return torch.bmm(torch.bmm(grouped, a[layer].transpose(1, 2)), b[layer]).view(TOKENS, outputs)

    def gathered(layer: int) -> torch.Tensor:
        hidden = torch.bmm(x[:, None], a[layer][token_slots].transpose(1, 2))
        return torch.bmm(hidden, b[layer][token_slots]).view(TOKENS, outputs)

    def grouped_mm(layer: int) -> torch.Tensor:
        hidden = torch._grouped_mm(x, a[layer].transpose(1, 2), offs=ends)
        result: torch.Tensor = torch._grouped_mm(hidden, b[layer], offs=ends)
        return result

    found: dict[str, Act] = {"bmm, slots as they lie": contiguous, "bmm, factors copied for each row": gathered}
    found |= {"one masked product": masked, "torch._grouped_mm": grouped_mm}
    reference = contiguous(0)
    for name, act in found.items():
        torch.testing.assert_close(act(0), reference, rtol=1e-4, atol=1e-2, msg=name)
    return {"the base's layer": lambda layer: torch.nn.functional.linear(x, weights[layer]), **found}


def layouts(rounds: int) -> list[dict[str, Any]]:
    """Median microseconds of each way for one layer."""
    lines = []
    for distinct in (1, 4, 16):
        for inputs, outputs in SHAPES:
            found = ways(distinct, inputs, outputs)
            taken: dict[str, list[float]] = {name: [] for name in found}
            for number in range(rounds + 1):
                for name in list(found)[:: 1 if number % 2 else -1]:
                    start = time.perf_counter()
                    for layer in range(LAYERS):
                        found[name](layer)
                    taken[name].append(1e6 * (time.perf_counter() - start) / LAYERS)
            medians = {name: round(statistics.median(spans[1:]), 1) for name, spans in taken.items()}
            lines.append({"adapters": distinct, "inputs": inputs, "outputs": outputs, "microseconds": medians})
    return lines
