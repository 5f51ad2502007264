"""The PEFT model that is trained: PEFT's own, but for what it says about its head."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer


class AdaptedModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A base with an adapter in it.

    TRL 1.16 refuses models whose head is one of PEFT's layers, because its own loss reads the weight beneath. Trained
    rows of a tied embedding are in the head too, and our loss (generation/forward.py) goes through the layer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for module in self.modules():
            # AdaLoRA divides by the rank that is left. PEFT 0.21 holds it in a frozen parameter, which becomes a
            # trained one when it is moved to a 16-bit layer's dtype (`_move_adapter_to_device_of_base_layer`).
            if isinstance(ranks := getattr(module, "ranknum", None), torch.nn.ParameterDict):
                ranks.requires_grad_(False)

    def get_output_embeddings(self) -> Any:
        """The base's own head, beneath an adapter on it."""
        head = self.get_base_model().get_output_embeddings()
        return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


class HeadedModel(PeftModel):  # type: ignore[misc]
    """A base with a task's head and an adapter in it; the head is trained beside the adapter.

    PEFT's own classes per task rewrite labels, and look for the head under two names only.
    """


def adapted(model: torch.nn.Module, config: Any, **options: Any) -> Any:
    """PEFT's model around one that answers, or around one with a task's head."""
    kind = AdaptedModel if hasattr(model, "prepare_inputs_for_generation") else HeadedModel
    return kind(model, config, **options)
