"""The shape of a base's weights, worked out from its config.json: no weights are read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftkit.errors import BaseError
from peftkit.planning.families import FAMILIES, Family
from peftkit.planning.keys import Keys
from peftkit.planning.shapes import (
    Experts,
    Linear,
    Shape,
    TaskHead,
    expert_parameters,
    experts_of,
    linears_of,
    norm_parameters,
    norms_per_block,
)

__all__ = ["Architecture", "Experts", "Linear", "TaskHead", "architecture"]


@dataclass(frozen=True)
class Architecture:
    """What the memory and time of a decoder depend on. Counts are of parameters, not bytes."""

    model_type: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The head shares the embedding's weight."""
    activation: str
    parallel: bool
    """Attention and MLP read the same input."""
    qk_norm: bool
    window: int
    """Tokens that a sliding layer sees; 0 where no layer slides."""
    sliding_layers: int
    softcapped: bool
    """Attention scores are capped, which only the eager kernel does."""
    capped_logits: bool
    scaled_logits: bool
    second_norm: bool
    """In a parallel block, the MLP has a norm of its own."""
    experts: Experts | None
    linears: tuple[Linear, ...]
    """Linear layers of the blocks: what is quantized, and what `all-linear` adapts. The head is not among them."""
    embedding_parameters: int
    """Word and learned position embeddings."""
    position_parameters: int
    """The learned position embeddings among them."""
    norm_parameters: int
    bias_parameters: int
    """Biases of the linear layers and of the head."""
    expert_parameters: int
    """Stacked experts and their routers."""
    head_parameters: int
    """Entries of the head's weight; 0 where it is tied."""
    stored: int
    """Bytes of a number in the base's file; 2 where config.json does not say."""
    final_norm: bool = True
    """Whether a norm stands behind the last block (OPT-350M has none)."""
    task: TaskHead | None = None
    """What stands in place of the language head."""
    bare: Architecture | None = None
    """Under a task's head: the base with its language head."""

    def with_task(self, task: TaskHead) -> Architecture:
        """The same blocks under a task's head: there is no language head, and nothing shares the embedding's weight."""
        return replace(self, task=task, tied=False, head_parameters=0, bare=self)

    @property
    def outputs(self) -> int:
        """Scores that the head gives a token."""
        return self.task.outputs if self.task else self.vocabulary

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def broadcasts(self) -> bool:
        """One key head is broadcast over the query heads, which no fused attention kernel takes (Falcon-7B)."""
        return self.model_type == "falcon" and self.kv_heads == 1

    @property
    def linear_parameters(self) -> int:
        """Entries of all linear weights of the blocks."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """Everything but linear weights of the blocks, embeddings and head."""
        return self.norm_parameters + self.bias_parameters + self.expert_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the base; a tied head counts once."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters + self.head_parameters

    def targets(self, target_modules: str | tuple[str, ...]) -> tuple[Linear, ...]:
        """The linear layers that an adapter goes on: `all-linear`, or those whose name ends with one of the endings.

        Raises BaseError when an ending fits no layer.
        """
        if target_modules == "all-linear":
            return self.linears
        endings = (target_modules,) if isinstance(target_modules, str) else target_modules
        for ending in endings:
            if not any(_ends(linear.name, ending) for linear in self.linears):
                raise BaseError(
                    f"no linear layer of a {self.model_type} base ends with {ending!r}",
                    expected="all-linear, or endings of " + ", ".join(linear.name for linear in self.linears),
                )
        return tuple(linear for linear in self.linears if any(_ends(linear.name, ending) for ending in endings))

    def adapter_parameters(self, r: int, target_modules: str | tuple[str, ...] = "all-linear") -> int:
        """Entries of LoRA's A and B: r * (out + into) for every adapted layer."""
        return sum(r * (linear.out + linear.into) * linear.count for linear in self.targets(target_modules))


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Raises BaseError naming the missing key, or for a model type that is not known here.
    """
    keys = Keys(config)
    family = _family(keys.model_type)
    hidden, heads = keys.count("hidden_size", "n_embd"), keys.count("num_attention_heads", "n_head")
    layers = keys.count("num_hidden_layers", "n_layer")
    head_dim = keys.count("head_dim", default=family.head_dim or hidden // heads)
    kv_heads = _kv_heads(keys, heads)
    intermediate = keys.count("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden)
    vocabulary = keys.count("vocab_size")
    embedding = keys.count("word_embed_proj_dim", default=hidden)
    experts = experts_of(keys, family, layers, intermediate)
    window, sliding_layers = _window(keys, family, layers)
    tied = bool(keys.get("tie_word_embeddings", default=family.tied))
    qk_norm = family.qk_norm is not None and keys.switch(family.qk_norm_switch)
    shape = Shape(hidden, heads * head_dim, kv_heads * head_dim, intermediate, layers)
    linears = tuple(linears_of(shape, keys, family, experts, embedding))
    positions = 0
    if family.positions is not None:
        positions = hidden * (keys.count("max_position_embeddings", "n_positions") + family.positions)
    return Architecture(
        model_type=keys.model_type,
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=tied,
        activation=str(keys.get("hidden_activation", "hidden_act", "activation_function", default=family.activation)),
        parallel=_parallel(keys, family),
        qk_norm=qk_norm,
        window=window,
        sliding_layers=sliding_layers,
        softcapped=bool(keys.get("attn_logit_softcapping", default=_softcap(keys, 50.0))),
        capped_logits=bool(keys.get("final_logit_softcapping", default=_softcap(keys, 30.0))),
        second_norm=norms_per_block(keys, family) == 2,
        scaled_logits=keys.model_type in ("granite", "cohere"),
        experts=experts,
        linears=linears,
        embedding_parameters=vocabulary * embedding + positions,
        position_parameters=positions,
        norm_parameters=norm_parameters(shape, keys, family, head_dim, qk_norm),
        bias_parameters=sum(linear.out * linear.count for linear in linears if linear.bias)
        + (vocabulary if family.head_bias else 0),
        expert_parameters=expert_parameters(hidden, experts),
        head_parameters=0 if tied else vocabulary * embedding,
        stored=4 if keys.get("dtype", "torch_dtype") == "float32" else 2,
        final_norm=bool(keys.get("do_layer_norm_before", default=True)),
    )


def _family(model_type: str) -> Family:
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    raise BaseError(
        f"the memory of a base of model type {model_type!r} cannot be planned: its blocks are not known here",
        expected="one of " + ", ".join(sorted(FAMILIES)),
        hint=f"if its blocks are those of {near[0]}, say so in model_type"
        if near
        else "train it without a plan and --budget: the longest rows are tried before the first step",
    )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _softcap(keys: Keys, value: float) -> float | None:
    return value if keys.model_type == "gemma2" else None


def _parallel(keys: Keys, family: Family) -> bool:
    return keys.switch(family.parallel) or bool(keys.get("new_decoder_architecture"))


def _kv_heads(keys: Keys, heads: int) -> int:
    if keys.model_type == "falcon" and not keys.get("new_decoder_architecture"):
        return 1 if keys.get("multi_query", default=True) else heads
    return keys.count("num_key_value_heads", "num_kv_heads", default=heads)


def _window(keys: Keys, family: Family, layers: int) -> tuple[int, int]:
    """Tokens of the sliding window, and how many layers have one."""
    window = keys.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or keys.get("use_sliding_window") is False:
        return 0, 0
    listed = keys.get("layer_types")
    if isinstance(listed, list):
        return window, sum(kind == "sliding_attention" for kind in listed)
    if keys.get("use_sliding_window"):
        return window, max(0, layers - int(keys.get("max_window_layers", default=28)))
    counts = {None: 0, "all": layers, "alternate": (layers + 1) // 2, "five_of_six": layers - layers // 6}
    sliding = counts[family.sliding]
    return (window, sliding) if sliding else (0, 0)
