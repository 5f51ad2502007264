"""The linear layers, experts and norms of a decoder, counted from its config and family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from peftkit.base.head import HeadKind
from peftkit.planning.families import Family
from peftkit.planning.keys import Keys


@dataclass(frozen=True)
class Linear:
    """All linear layers of one name: a weight of shape (out, into), `count` times in the base."""

    name: str
    """The path inside a block, such as `self_attn.q_proj`."""
    out: int
    into: int
    count: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Entries of all `count` weights, without biases."""
        return self.out * self.into * self.count


@dataclass(frozen=True)
class TaskHead:
    """A task's head in the language head's place: one linear layer, trained whole in float32."""

    kind: HeadKind
    outputs: int
    """Scores of a token: labels, tags, or the two ends of a span."""

    @property
    def bias(self) -> bool:
        """Whether it has a bias (`modeling_layers.py` in transformers)."""
        return self.kind in ("token", "span")

    @property
    def dropout(self) -> bool:
        """Whether its input is dropped out."""
        return self.kind == "token"

    @property
    def pooled(self) -> bool:
        """Whether the scores of one token are those of the row."""
        return self.kind == "sequence"

    def parameters(self, hidden: int) -> int:
        """Entries of weight and bias over states of this width."""
        return self.outputs * (hidden + self.bias)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the MLP's place; experts are stacked matrices, which nothing quantizes or adapts."""

    count: int
    per_token: int
    intermediate: int
    shared: int
    """Width of the shared expert's MLP; 0 without one."""
    layers: int
    """Blocks that have experts; the others have an MLP."""


@dataclass(frozen=True)
class Shape:
    """Widths of a block, and how many there are."""

    hidden: int
    queries: int
    keys: int
    intermediate: int
    layers: int


def experts_of(keys: Keys, family: Family, layers: int, intermediate: int) -> Experts | None:
    if not family.experts:
        return None
    dense = {index for index in keys.get("mlp_only_layers", default=[]) if 0 <= index < layers}
    step = int(keys.get("decoder_sparse_step", default=1))
    sparse = sum(index not in dense and (index + 1) % step == 0 for index in range(layers))
    return Experts(
        count=keys.count("num_experts", "num_local_experts"),
        per_token=keys.count("num_experts_per_tok"),
        intermediate=keys.count("moe_intermediate_size", default=intermediate),
        shared=int(keys.get("shared_expert_intermediate_size", default=0)),
        layers=sparse,
    )


def expert_parameters(hidden: int, experts: Experts | None) -> int:
    if experts is None:
        return 0
    return experts.layers * experts.count * (3 * hidden * experts.intermediate + hidden)


def linears_of(shape: Shape, keys: Keys, family: Family, experts: Experts | None, embedding: int) -> Iterator[Linear]:
    hidden, attention = shape.hidden, family.attention
    bias, count = keys.switch(family.qkv_bias), shape.layers
    widths = [shape.queries, shape.keys, shape.keys]
    if len(family.qkv) == 1:
        widths = [sum(widths)]
    for name, width in zip(family.qkv, widths, strict=True):
        yield Linear(f"{attention}.{name}", width, hidden, count, bias)
    yield Linear(f"{attention}.{family.output}", hidden, shape.queries, count, keys.switch(family.output_bias))
    if experts is not None:
        count -= experts.layers
        if experts.shared:
            yield from _mlp(
                replace(shape, intermediate=experts.shared), family, "mlp.shared_expert", False, experts.layers
            )
            yield Linear("mlp.shared_expert_gate", 1, hidden, experts.layers)
    if count:
        yield from _mlp(shape, family, family.mlp, keys.switch(family.mlp_bias), count)
    if embedding != hidden:
        yield Linear("project_out", embedding, hidden, 1)
        yield Linear("project_in", hidden, embedding, 1)


def _mlp(shape: Shape, family: Family, path: str, bias: bool, count: int) -> Iterator[Linear]:
    prefix = f"{path}." if path else ""
    width = shape.intermediate * (2 if family.gated and len(family.gate) == 1 else 1)
    for name in family.gate:
        yield Linear(f"{prefix}{name}", width, shape.hidden, count, bias)
    yield Linear(f"{prefix}{family.down}", shape.hidden, shape.intermediate, count, bias)


def norm_parameters(shape: Shape, keys: Keys, family: Family, head_dim: int, qk_norm: bool) -> int:
    final = 1 if keys.get("do_layer_norm_before", default=True) else 0  # OPT-350M has norms behind, and none at the end
    total = (shape.layers * norms_per_block(keys, family) + final) * shape.hidden * family.norm_weights
    return total + (shape.layers * _qk_norm_parameters(shape, keys, family, head_dim) if qk_norm else 0)


def norms_per_block(keys: Keys, family: Family) -> int:
    if keys.model_type == "falcon":
        return 2 if _two_norms(keys) else 1
    if keys.model_type == "stablelm" and keys.get("use_parallel_residual"):
        return 1
    return family.norms


def _two_norms(keys: Keys) -> bool:
    """Falcon: two norms in sequential blocks, and in the new blocks unless config.json says one."""
    if keys.get("new_decoder_architecture"):
        return int(keys.get("num_ln_in_parallel_attn", default=2)) == 2
    return not keys.get("parallel_attn", default=True)


def _qk_norm_parameters(shape: Shape, keys: Keys, family: Family, head_dim: int) -> int:
    if family.qk_norm == "full" or keys.model_type in ("cohere", "stablelm"):  # one weight for every head
        return shape.queries + shape.keys
    return 2 * head_dim * family.norm_weights
