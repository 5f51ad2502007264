"""Mixout: for one pass, some of the trained numbers are again those that the run started with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from peftkit.tuning.skeleton import places


def mixed(value: torch.Tensor, start: torch.Tensor, p: float) -> torch.Tensor:
    """(M ⊙ u + (1 - M) ⊙ w - p · u) / (1 - p) with M ~ Bernoulli(p), whose expectation is w.

    Lee, Cho and Kang 2020 (arXiv 1909.11299), eq. 5 and their code. A pass through it has a gradient where w was kept.
    """
    mask = torch.empty_like(value).bernoulli_(p).bool()
    return (torch.where(mask, start, value) - p * start) / (1 - p)


@contextmanager
def mixture(model: nn.Module, start: Mapping[str, torch.Tensor], p: float) -> Iterator[None]:
    """Put a mixture of value and start in the place of each parameter named in `start`, and take it out afterwards.

    One that is frozen for a while stays as it is.
    The backward pass belongs inside too: gradient checkpointing computes with the same mixture then, where
    torch.func.functional_call would have put the parameters back before the recomputation.
    """
    named = dict(model.named_parameters())
    values = {id(named[name]): mixed(named[name], u, p) for name, u in start.items() if named[name].requires_grad}
    found = [place for place in places(model) if id(place[2]) in values]  # a tied parameter hangs in two
    try:
        for held, key, parameter in found:
            held[key] = values[id(parameter)]
        yield
    finally:
        for held, key, parameter in found:
            held[key] = parameter
