"""What is asked of the engine, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length", "cancelled", "failed"]
"""Why an answer ended: by the model or a stop string, at max_new_tokens, by its asker, by an error."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy.

    The seed belongs to the request: its answer does not depend on what else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities add up to this much."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 is all of them."""
    seed: int = 0


@dataclass(frozen=True)
class Logprob:
    """The natural logarithm of a token's probability, before temperature, top-p and top-k."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, best first."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: tuple[int, ...]
    """Token ids."""
    adapter: str | None = None
    """What answers, as the engine's adapters know it; None is the base."""
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the tokenizer's own."""
    logprobs: int | None = None
    """None: no log-probabilities; n: those of the chosen tokens, and of the n likeliest at each position."""
    json_schema: Mapping[str, Any] | None = None
    """The answer is JSON that this schema describes."""


@dataclass(frozen=True)
class Completion:
    """A generated answer."""

    text: str
    """Without the end-of-turn token and without a stop string."""
    ids: list[int]
    """Without the end-of-turn token; with the tokens of a stop string."""
    stopped: bool
    """Whether the model ended the answer by itself, before max_new_tokens."""
    finish: Finish = "stop"
    adapter: str | None = None
    """`name@version` of what answered; None is the base."""
    logprobs: tuple[Logprob, ...] = ()
    """One for each of `ids`, when asked for."""
    error: str | None = None
    """What went wrong, when `finish` is `failed`."""
