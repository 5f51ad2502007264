"""Virtual tokens before the input, without the caller having to know: logits and answers are those of the given tokens.

PEFT 0.21 returns a logit for every virtual token too, and puts the virtual tokens of a batch before its left padding,
so that a row's answer depends on its neighbours (logits move by 2e-3 on a tiny base).
"""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftType

from peftkit.errors import TuningError

_IN_THE_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class PromptedModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A base with prompt tuning, p-tuning, prefix tuning, CPT or a cartridge."""

    begins_with_virtual_tokens = True
    """A cache that was filled without this adapter's virtual tokens cannot be continued."""

    @property
    def virtual_tokens(self) -> int:
        """How many positions stand before every input."""
        return int(self.active_peft_config.num_virtual_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        past_key_values: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
        **inputs: Any,
    ) -> Any:
        """The base's output; `logits` has one position per given token, or those of `logits_to_keep`."""
        _refuse_cache(past_key_values)
        extra = self._extra_positions()
        if isinstance(logits_to_keep, torch.Tensor):
            return super().forward(input_ids, logits_to_keep=logits_to_keep + extra, **inputs)
        out = super().forward(input_ids, logits_to_keep=logits_to_keep, **inputs)
        if extra and not logits_to_keep:
            out.logits = out.logits[:, extra:]
        return out

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        """Token ids of shape (rows, given + new), padded with the config's pad id; each row is generated alone."""
        _refuse_cache(options.get("past_key_values"))
        if attention_mask is None or bool(attention_mask.all()) or not self._extra_positions():
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        given = input_ids.shape[1]
        answers = []
        for row, mask in zip(input_ids, attention_mask.bool(), strict=True):
            ids = row[mask][None]
            out = super().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            answers.append(out[0, ids.shape[1] :])
        longest = max(len(answer) for answer in answers)
        config = options.get("generation_config") or self.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        result = input_ids.new_full((len(answers), given + longest), pad)
        result[:, :given] = input_ids
        for i, answer in enumerate(answers):
            result[i, given : given + len(answer)] = answer
        return result

    @property
    def fills_the_cache(self) -> bool:
        """Whether the virtual tokens are keys and values in the cache, which checkpointed layers do not read."""
        return self.active_peft_config.peft_type in _IN_THE_CACHE

    def _extra_positions(self) -> int:
        return 0 if self.fills_the_cache else int(self.active_peft_config.num_virtual_tokens)


def _refuse_cache(past_key_values: Any) -> None:
    if past_key_values is not None:
        raise TuningError(
            "this adapter begins every input with virtual tokens, and the given cache was filled without them",
            expected="whole inputs, without past_key_values",
        )
