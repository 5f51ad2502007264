"""A backbone with something trainable in it: an adapter beside the base's layers, or tensors in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.backbone.load import Backbone
from peftkit.tuning.methods import METHODS, AdapterSpec, Kind


@dataclass(frozen=True)
class Tuned:
    """A backbone with trainable numbers in it."""

    model: Any
    """What to call: PEFT's model around the backbone's, or a second tree of modules with tensors of its own."""
    backbone: Backbone
    spec: AdapterSpec
    names: tuple[str, ...]
    """The trained parameters, by their names in `model`; some may be frozen for a while."""
    parents: tuple[dict[str, str], ...] = ()
    """Versions that this adapter continues, for the lineage."""
    receipts: tuple[dict[str, Any], ...] = ()
    """What was gone on with by an explicit flag, for the manifest."""

    @property
    def kind(self) -> Kind:
        """What it is stored as in the registry."""
        return METHODS[self.spec.method].kind

    @property
    def inner(self) -> Any:
        """The transformers model that computes, without PEFT's around it."""
        return self.model.get_base_model() if self.kind == "peft" else self.model

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training changes, by name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    @property
    def trainable_parameters(self) -> int:
        """How many numbers training changes."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """What the untouched base computes: the model with the adapter off, or the backbone's own model."""
        if self.kind == "tensors":
            yield self.backbone.model
            return
        with self.model.disable_adapter():
            yield self.model


def trained_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the parameters that require a gradient now."""
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
