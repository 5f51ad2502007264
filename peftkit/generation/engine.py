"""Generation for evaluation, chat and checks: greedy or sampled, in batches, with a shared prompt prefix read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from peftkit.base.tokenizer import Tokenizer

# A prefix shorter than this costs more in bookkeeping than reading it again for every row.
_WORTH_SHARING = 16


@dataclass(frozen=True)
class Completion:
    """A generated answer."""

    text: str
    """Without the end-of-turn token."""
    ids: list[int]
    stopped: bool
    """Whether the model ended the answer by itself, before max_new_tokens."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


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

    Prompts of similar length share a batch, padded on the left; tokens that begin all prompts of a batch go through
    the model once. Greedy answers are those of one prompt alone, up to float rounding of batched products.
    """
    chosen = sampling or Sampling()
    answers: list[Completion | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    done = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(chosen.seed)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            ids = _generate_batch(model, [prompts[i] for i in indices], tokenizer, device, max_new_tokens, chosen)
            for index, row in zip(indices, ids, strict=True):
                answers[index] = _completion(row, tokenizer)
            done += len(indices)
            progress(done)
    return [answer for answer in answers if answer is not None]


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    device: torch.device,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[list[int]]:
    shared = _shared_prefix(prompts) if _can_share(model) else 0
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), tokenizer.pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        # The shared prefix stays on the left and padding comes after it, so that its cache fits every row.
        rest = len(prompt) - shared
        ids[i, :shared], mask[i, :shared] = torch.tensor(prompt[:shared], dtype=torch.long), 1
        ids[i, longest - rest :], mask[i, longest - rest :] = torch.tensor(prompt[shared:], dtype=torch.long), 1
    ids, mask = ids.to(device), mask.to(device)
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    with torch.inference_mode():
        if shared:
            options["past_key_values"] = _prefix_cache(model, ids[:1, :shared], len(prompts))
        out = model.generate(**options, generation_config=_generation_config(tokenizer, max_new_tokens, sampling))
    return [row.tolist() for row in out[:, longest:].cpu()]


def _can_share(model: Any) -> bool:
    """Whether a prefix can be read once for all rows: the cache keeps all its tokens, and nothing stands before it.

    In a sliding window, padding would push a shared prefix out; prompt tuning puts virtual tokens before every prompt.
    """
    if getattr(model, "begins_with_virtual_tokens", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _shared_prefix(prompts: list[list[int]]) -> int:
    """Number of leading tokens that all prompts share, at least one token short of the shortest; 0 if not worth it."""
    limit = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    shared = next((i for i in range(limit) if any(prompt[i] != first[i] for prompt in prompts)), limit)
    return shared if len(prompts) > 1 and shared >= _WORTH_SHARING else 0


def _prefix_cache(model: Any, prefix: torch.Tensor, rows: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    return cache


def _generation_config(tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling) -> GenerationConfig:
    # top_k=0 switches off transformers' default of 50, which nobody asked for.
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
        use_cache=True,
        **(sampled if sampling.temperature > 0 else {}),
    )


def _completion(ids: list[int], tokenizer: Tokenizer) -> Completion:
    stop = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), None)
    kept = ids if stop is None else ids[:stop]
    return Completion(tokenizer.decode(kept), kept, stopped=stop is not None)
