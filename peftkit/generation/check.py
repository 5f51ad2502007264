"""Refuses a request that cannot be answered as asked, before it takes a place in the queue."""

from __future__ import annotations

from collections.abc import Iterable

from peftkit.errors import ConfigError
from peftkit.generation.requests import Request, Sampling

_SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes
_SHOWN = 5


def check(request: Request, vocabulary: int, positions: int | None = None) -> None:
    """Raise ConfigError with everything that is wrong with `request`.

    The model gives logits for `vocabulary` tokens, and has `positions` for a prompt and its answer; None is no limit.
    """
    problems = [*_sampling(request.sampling), *_ids(request, vocabulary)]
    if positions is not None and len(request.prompt) >= positions:
        problems.append(
            f"the prompt has {len(request.prompt)} tokens: take fewer than {positions}, the model's positions"
        )
    if request.max_new_tokens < 1:
        problems.append(f"max_new_tokens is {request.max_new_tokens}: take at least 1")
    if "" in request.stop:
        problems.append("a stop string is empty: it would end every answer before it begins")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
        problems.append(f"logprobs is {request.logprobs}: take 0 to {vocabulary}, the size of the vocabulary, or none")
    if problems:
        raise ConfigError(problems, where="the request")


def _sampling(sampling: Sampling) -> Iterable[str]:
    # Written so that NaN, which compares false, is refused too.
    if not 0 <= sampling.temperature < float("inf"):
        yield f"temperature is {sampling.temperature}: take 0, which is greedy, or a positive number"
    if not 0 < sampling.top_p <= 1:
        yield f"top_p is {sampling.top_p}: take more than 0 and at most 1"
    if sampling.top_k < 0:
        yield f"top_k is {sampling.top_k}: take 0, which is all tokens, or how many to draw from"
    if sampling.seed not in _SEEDS:
        yield f"seed is {sampling.seed}: take -2^63 to 2^64 - 1"


def _ids(request: Request, vocabulary: int) -> Iterable[str]:
    if not request.prompt:
        yield "the prompt is empty: it needs at least one token, such as the tokenizer's BOS"
    for name, ids in (("prompt", request.prompt), ("stop_ids", request.stop_ids)):
        strangers = [token for token in ids if not 0 <= token < vocabulary]
        if strangers:
            shown = ", ".join(map(str, strangers[:_SHOWN]))
            more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
            yield f"{name} has ids outside the vocabulary of {vocabulary} tokens: {shown}{more}"
