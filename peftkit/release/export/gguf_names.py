"""Where a Hugging Face tensor stands in a GGUF file, and how llama.cpp wants its numbers.

Names come from the `gguf` package's own table. What it does not know is written here, per architecture: rows of Llama's
q and k are interleaved for ggml's rotary embedding, and Gemma's norms are stored as 1 + w. Source: llama.cpp,
convert_hf_to_gguf.py, `LlamaModel.permute` and `Gemma2Model.modify_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import gguf

from peftkit.errors import DeltaError

Block = TypeVar("Block", bound=Any)
"""A numpy array or a torch tensor; both have reshape and swapaxes."""


@dataclass(frozen=True)
class Family:
    """What one `model_type` of transformers is to llama.cpp."""

    arch: str
    """`general.architecture`."""
    activation: str
    """The only activation that llama.cpp computes for this architecture."""
    interleaved: bool = False
    """Whether q and k rows are reordered within each head."""
    norm_offset: float = 0.0
    """Added to every norm's weight."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "silu", interleaved=True),
    "qwen2": Family("qwen2", "silu"),
    "qwen3": Family("qwen3", "silu"),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_offset=1.0),
}
"""Architectures whose exported logits are compared with transformers' and llama.cpp's in the tests."""


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file."""

    name: str
    head_rows: int | None = None
    """Rows of one head when they are interleaved, None when rows stay as they are."""
    offset: float = 0.0


@dataclass(frozen=True)
class Layout:
    """The GGUF names of one base."""

    family: Family
    names: Any
    """gguf.TensorNameMap."""
    head_dim: int
    tied: bool

    def target(self, name: str) -> Target | None:
        """Where `name` goes; None for a tensor that GGUF files leave out: a tied head, rotary frequencies.

        Raises DeltaError for a tensor that llama.cpp has no place for.
        """
        if name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight"):
            return None
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise DeltaError(
                f"{name} has no place in a {self.family.arch} GGUF file",
                expected="the tensors of a plain Llama, Qwen2, Qwen3, Gemma 2 or Gemma 3 model",
                hint=_COMMAND,
            )
        head = self.family.interleaved and (".attn_q." in found or ".attn_k." in found)
        offset = self.family.norm_offset if found.endswith("norm.weight") else 0.0
        return Target(found, self.head_dim if head else None, offset)


_COMMAND = "llama.cpp's own converter: python convert_hf_to_gguf.py FOLDER --outfile OUT.gguf"


def layout(config: Mapping[str, Any]) -> Layout:
    """The layout of a base by its config.json. Raises DeltaError, with llama.cpp's command, for any other model."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise DeltaError(
            f"peftkit writes no GGUF of a {kind!r} model: its tensor names and their order are not tested",
            expected="model_type " + ", ".join(FAMILIES),
            hint=_COMMAND,
        )
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        raise DeltaError(
            f"this {kind} model uses the activation {activation!r}",
            expected=f"{family.activation!r}, the only one that llama.cpp computes for it",
        )
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    return Layout(
        family,
        gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"])),
        int(config.get("head_dim") or width // heads),
        bool(config.get("tie_word_embeddings", family.norm_offset != 0.0)),
    )


def interleaved(rows: Block, head_rows: int) -> Block:
    """Whole heads of q or k, shape (n · head_rows, …), with the halves that transformers rotates as pairs side by side.

    Row j of the first half and row j of the second become rows 2j and 2j + 1, the pair that ggml rotates.
    """
    shape = rows.shape
    paired: Block = rows.reshape(-1, 2, head_rows // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    return paired
