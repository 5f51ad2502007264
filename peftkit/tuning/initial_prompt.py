"""Virtual tokens begin as real ones: prompt tuning with their embeddings, prefix tuning with their keys and values.

Until they are trained, a model with virtual tokens computes what the base does with these tokens before every input.
Random numbers begin worse (Lester et al. 2021, arXiv 2104.08691, compare both). A prefix of zeros is no identity
either: a key of 0 has the score 0, and takes attention from the input.
"""

from __future__ import annotations

from typing import Any

import torch

from peftkit.backbone.load import Backbone
from peftkit.errors import TuningError
from peftkit.tuning.initial import NAME, common_tokens, written


def begin_prompt(model: Any, backbone: Backbone, count: int, seed: int) -> list[int]:
    """Fill prompt tuning's embeddings with those of tokens; returns their ids."""
    ids = common_tokens(backbone, count, seed)
    with torch.no_grad():
        rows = backbone.model.get_input_embeddings()(torch.tensor(ids, device=backbone.device))
    written(model.prompt_encoder[NAME].embedding.weight, rows)
    return ids


def begin_prefix(model: Any, backbone: Backbone, count: int, seed: int) -> list[int]:
    """Fill prefix tuning's keys and values with those that the base computes for tokens; returns their ids.

    Raises TuningError for a base whose layers do not all cache keys and values of one shape.
    """
    ids = common_tokens(backbone, count, seed)
    with torch.no_grad():
        out = backbone.model(input_ids=torch.tensor([ids], device=backbone.device), use_cache=True)
    held = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in out.past_key_values.layers]
    weight = model.prompt_encoder[NAME].embedding.weight
    flat = [_by_token(each) for pair in held for each in pair]
    if any(each is None for each in flat) or sum(each.shape[1] for each in flat if each is not None) != weight.shape[1]:
        raise TuningError(
            f"prefix tuning puts keys and values of one shape into every layer, and {type(backbone.model).__name__} "
            "does not cache such",
            expected="a base with the same attention in every layer",
            hint="adapter.method=prompt_tuning",
        )
    written(weight, torch.cat([each for each in flat if each is not None], dim=1))
    return ids


def _by_token(cached: Any) -> torch.Tensor | None:
    """(1, heads, tokens, width) → (tokens, heads · width); None for anything else."""
    if not isinstance(cached, torch.Tensor) or cached.dim() != 4:
        return None
    return cached[0].transpose(0, 1).flatten(1)
