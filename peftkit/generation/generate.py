"""Answers to many prompts by one model, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from peftkit.base.tokenizer import Tokenizer
from peftkit.generation.engine import Engine
from peftkit.generation.limits import Limits, positions_of
from peftkit.generation.requests import Completion, Request, Sampling
from peftkit.generation.running import Ticket
from peftkit.generation.seats import One


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """Answer every prompt (token ids), in the order given.

    Greedy answers are those of one prompt alone, up to float rounding of batched products; sampled ones begin at the
    seed, one further for each prompt. Raises what goes wrong with any of them.
    """
    chosen = sampling or Sampling()
    config = model.config.get_text_config()
    engine = Engine(
        One(model),
        tokenizer,
        device=device,
        vocabulary=config.vocab_size,
        positions=positions_of(model),
        limits=Limits(rows=batch_size),
    )
    requests = [
        Request(tuple(prompt), max_new_tokens=max_new_tokens, sampling=replace(chosen, seed=chosen.seed + i))
        for i, prompt in enumerate(prompts)
    ]
    # Rows of similar length are read together: least padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    tickets = {i: engine.submit(requests[i]) for i in order}
    done = 0
    while engine.step():
        if (now := len(prompts) - engine.running - engine.waiting) > done:
            done = now
            _raise_failure(tickets.values())
            progress(done)
    _raise_failure(tickets.values())
    if done < len(prompts):
        progress(len(prompts))
    return [_completion(tickets[i]) for i in range(len(prompts))]


def _completion(ticket: Ticket) -> Completion:
    assert ticket.completion is not None
    return ticket.completion


def _raise_failure(tickets: Iterable[Ticket]) -> None:
    for ticket in tickets:
        if ticket.error is not None:
            raise ticket.error
