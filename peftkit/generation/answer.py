"""The next turn of a conversation, by whatever is active on a host of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.data.audit import recorded_rendering
from peftkit.data.chat import chat_prompt
from peftkit.generation.engine import Sampling, generate
from peftkit.generation.forward import autocast
from peftkit.registry.manifest import Version
from peftkit.tuning.attach import Attached


def answer(
    host: Attached,
    rendered_as: Version,
    turns: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> str:
    """Answer `turns` with the active adapter, or with the base when none is active.

    The turns are rendered as the active adapter's training rendered its rows; for the base, as `rendered_as` did.
    """
    active = host.versions.get(host.active or "", rendered_as)
    rendering = recorded_rendering(active.manifest.recipe.config if active.manifest.recipe else {})
    backbone = host.backbone
    ids = chat_prompt([dict(turn) for turn in turns], backbone.tokenizer, rendering)
    with autocast(backbone.device, backbone.placement.compute_dtype):
        completions = generate(
            host.model,
            [ids],
            backbone.tokenizer,
            device=backbone.device,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )
    return completions[0].text
