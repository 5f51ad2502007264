"""From the names that PEFT gives modules to the tensors of the base's files, and what kind of layer each belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftkit.backbone.headed import Headed
from peftkit.base.dense import Dense
from peftkit.deltas.delta import Layer, Place
from peftkit.errors import DeltaError
from peftkit.registry.intake.shapes import Base
from peftkit.registry.intake.tensors import EMBEDDINGS

HEADS = ("lm_head", "embed_out")
"""What causal models call their head; of a tied one the files hold only the embedding."""

# The model types of transformers 5.23 whose linear layers are `pytorch_utils.Conv1D`, which keeps (in, out). A square
# weight does not show it, and the saved `fan_in_fan_out` is that of the last layer (peft/tuners/lora/model.py).
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")

# Those whose fused experts are (experts, in, out): `is_transposed` of their `use_experts_implementation`.
TRANSPOSED_EXPERTS_TYPES = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")

_PLAIN_LINEARS = (*HEADS, "score", "classifier", "qa_outputs", "summary")


@dataclass(frozen=True)
class Site:
    """One parameter that an adapter touches."""

    tensor: str
    """Its name in the base's files, or the one that it gets there."""
    place: Place
    shape: tuple[int, ...]
    """As the base's file has it."""
    source: str | None = None
    """The tensor that it begins as, where the files do not hold it: a tied head begins as the embedding."""

    @property
    def layer(self) -> Layer:
        """What kind of layer it belongs to."""
        return self.place.layer

    @property
    def read(self) -> str:
        """The tensor of the files that it begins as."""
        return self.source or self.tensor

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of a weight as the file has it; a convolution's columns count its kernel."""
        return (self.shape[0] if self.shape else 1), math.prod(self.shape[1:])

    @property
    def wide(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        rows, columns = self.matrix
        return (columns, rows) if self.layer in ("conv1d", "embedding") else (rows, columns)


class Names:
    """The base's tensors under the names that PEFT gives modules."""

    def __init__(self, base: Mapping[str, Dense], config: Mapping[str, Any], headed: Headed | None = None) -> None:
        self._files = {name: file for file, name in headed.files.items()} if headed else {}
        self._base = base
        self._modules = Base({name: dense.shape for name, dense in base.items()}, {})
        text = config.get("text_config")
        inner = text if isinstance(text, dict) else {}
        self._types = {str(config.get("model_type")), str(inner.get("model_type"))}
        own_head = headed is not None and not headed.answers  # the language head is gone, and with it the tie
        self._tied = (
            not own_head
            and _may_be_tied(config, inner)
            and not any(name.removesuffix(".weight") in HEADS for name in base)
        )
        self.encoder_decoder = bool(config.get("is_encoder_decoder"))
        """Whether the model has two embeddings, which tying shares among more than a head."""

    @property
    def embedding(self) -> str | None:
        """The embedding that is the head too; None for a base whose head is a tensor of its own."""
        own = self._modules.module(HEADS[0]) if self._tied else None
        return f"{own}.weight" if own else None

    @property
    def head(self) -> str:
        """What a head of its own is called in the files."""
        embedding = self.embedding or ""
        return f"{HEADS[1] if embedding.endswith('embed_in.weight') else HEADS[0]}.weight"

    def site(self, module: str, parameter: str = "weight") -> Site:
        """The parameter of a module. Raises DeltaError when the base's files have no such tensor."""
        own = self._modules.module(module)
        tensor = f"{own}.{parameter}" if own else f"{module}.{parameter}"
        if file := self._files.get(f"{module}.{parameter}"):
            own, tensor = module, file
        by_name = own in (module, module.partition(".")[2], f"model.{module}")
        if tensor not in self._base or not (by_name or tensor == self.embedding):
            raise DeltaError(
                f"the base's files hold no tensor {module}.{parameter}",
                expected="a base whose files name its tensors as the model does",
                hint=self._per_expert(module),
            )
        shape, last = tuple(self._base[tensor].shape), module.rpartition(".")[2]
        if last in HEADS and tensor == self.embedding:
            return Site(f"{module}.{parameter}", Place(module, "linear", parameter), shape, tensor)
        return Site(tensor, Place(module, self._layer(last, parameter, shape), parameter), shape)

    def parameters(self, module: str) -> list[str]:
        """The module's own tensors in the base's files, sorted."""
        own = self._modules.module(module)
        found = [name.removeprefix(f"{own}.") for name in self._base if name.startswith(f"{own}.")]
        return sorted(name for name in found if "." not in name)

    @property
    def transposed_experts(self) -> bool:
        """Whether fused experts are stored as (experts, in, out)."""
        return bool(self._types & set(TRANSPOSED_EXPERTS_TYPES))

    def _per_expert(self, module: str) -> str | None:
        if not self._modules.module(f"{module}.0"):
            return None
        return "the files hold its experts one by one; use a base whose files hold them fused"

    def _layer(self, last: str, parameter: str, shape: tuple[int, ...]) -> Layer:
        if last in EMBEDDINGS and last not in HEADS:
            return "embedding"
        if parameter == "bias":
            return "bias"
        if len(shape) == 3 and parameter != "weight":
            return "experts"
        if len(shape) > 2:
            return "conv"
        if len(shape) < 2:
            return "other"
        return "conv1d" if self._types & set(CONV1D_TYPES) and last not in _PLAIN_LINEARS else "linear"


def _may_be_tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the model has a head that may be its embedding. transformers leaves a setting out at its default."""
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    classes = [str(name) for name in config.get("architectures") or ()]
    generates = any(word in name for name in classes for word in ("CausalLM", "LMHead", "ConditionalGeneration"))
    return tied is not False and (generates or not classes)
