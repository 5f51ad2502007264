"""The PEFT model that is trained: PEFT's own, but for what it says about its head."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from typing import Any

from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer


class AdaptedModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A base with an adapter in it.

    TRL 1.16 refuses models whose head is one of PEFT's layers, because its own loss reads the weight beneath. Trained
    rows of a tied embedding are in the head too, and our loss (generation/forward.py) goes through the layer.
    """

    def get_output_embeddings(self) -> Any:
        """The base's own head, beneath an adapter on it."""
        head = self.get_base_model().get_output_embeddings()
        return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
