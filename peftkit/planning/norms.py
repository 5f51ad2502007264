"""The norms of a block: where they stand, what they are called, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from peftkit.planning.architecture import Architecture


@dataclass(frozen=True)
class Norm:
    """One norm."""

    name: str
    """The path inside a block, such as `input_layernorm`."""
    width: int
    """Numbers that are normed together."""
    entries: int
    """Of its weight, and of its bias: there may be a weight for each of many heads."""
    vectors: int
    """0 without parameters, 1 with a weight, 2 with a bias too."""


@dataclass(frozen=True)
class BlockNorms:
    """The norms of a block by their places; None where none stands."""

    before_attention: Norm | None
    before_mlp: Norm | None
    """In a parallel block without one, the MLP reads what attention does."""
    behind_attention: Norm | None
    behind_mlp: Norm | None
    queries: Norm | None
    keys: Norm | None

    def __iter__(self) -> Iterator[Norm]:
        found = (getattr(self, field.name) for field in fields(self))
        return (norm for norm in found if norm is not None)


def block_norms(architecture: Architecture) -> BlockNorms:
    """The norms of one of a base's blocks."""
    family, hidden = architecture.family, architecture.hidden
    first, second, third, fourth = _names(architecture)

    def norm(name: str | None) -> Norm | None:
        return Norm(name, hidden, hidden, family.norm_weights) if name else None

    queries, keys = _of_heads(architecture)
    return BlockNorms(norm(first), norm(second), norm(third), norm(fourth), queries, keys)


def _names(architecture: Architecture) -> tuple[str | None, ...]:
    """Before attention and MLP, and behind them."""
    family, names = architecture.family, architecture.family.names.norms
    if family.norms == 4:
        return names[0], names[2], names[1], names[3]
    if family.post_norms:
        return None, None, names[1], names[3]
    if architecture.model_type == "falcon" and architecture.parallel and architecture.second_norm:
        return "ln_attn", "ln_mlp", None, None
    return names[0], names[1] if architecture.second_norm else None, None, None


def _of_heads(architecture: Architecture) -> tuple[Norm | None, Norm | None]:
    if not architecture.qk_norm:
        return None, None
    family = architecture.family
    full = family.qk_norm == "full"
    per_head = architecture.model_type in ("cohere", "stablelm")  # one weight, without a bias, for every head
    vectors = 1 if per_head else family.norm_weights
    query, key = (
        Norm(name, entries if full else architecture.head_dim, entries if full or per_head else architecture.head_dim,
             vectors)
        for name, entries in zip(family.names.norms[-2:], (architecture.queries, architecture.keys), strict=True)
    )  # fmt: skip
    return query, key
