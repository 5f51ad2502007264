"""What a setting trains: in every block, and around the blocks; the same choice as `tuning.partial` and PEFT make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

from peftkit.planning.architecture import Architecture, Linear
from peftkit.planning.norms import block_norms
from peftkit.planning.setting import PARTIAL, PROMPTS, Setting

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Touched:
    """What is trained in one block: names of its linear layers and norms."""

    adapted: frozenset[str] = _NONE
    """Layers with an adapter."""
    weights: frozenset[str] = _NONE
    """Layers whose own weight is trained."""
    biases: frozenset[str] = _NONE
    """Layers whose own bias is trained."""
    norms: frozenset[str] = _NONE
    """Norms whose weight is trained."""
    norm_biases: frozenset[str] = _NONE
    experts: bool = False

    @property
    def any(self) -> bool:
        """Whether anything is."""
        parts = (self.adapted, self.weights, self.biases, self.norms, self.norm_biases, self.experts)
        return any(bool(part) for part in parts)


@dataclass(frozen=True)
class Trained:
    """What is trained in a base."""

    blocks: tuple[Touched, ...]
    """One for each block, the first one behind the embeddings."""
    embedding: bool = False
    positions: bool = False
    norm: bool = False
    """The final norm's weight."""
    norm_bias: bool = False
    head: bool = False
    """A head of its own; a tied one that is trained with the embeddings is not."""
    head_bias: bool = False
    outside: bool = False
    """Linear layers between the embeddings and the blocks, and behind these (OPT-350M)."""
    in_prompt: bool = False
    """Virtual tokens before the input, or rows of the embedding."""

    @property
    def lowest(self) -> int:
        """The first block that the backward pass reaches; as many as there are blocks where it stops before them."""
        if self.embedding or self.positions or self.outside or self.in_prompt:
            return 0
        return next((index for index, block in enumerate(self.blocks) if block.any), len(self.blocks))

    def share(self, name: str, what: str) -> int:
        """In how many blocks a name is among the `adapted`, the `weights`, the `biases`, the `norms`, …"""
        return sum(name in getattr(block, what) for block in self.blocks)


def trained(architecture: Architecture, setting: Setting) -> Trained:
    """What a setting trains. Raises BaseError when an ending of target_modules fits no layer."""
    places = setting.target_modules, setting.layers, setting.top_layers, setting.train_head, setting.patterns
    what = _trained(architecture, setting.method, *places)
    if architecture.task:  # it is trained whatever the method is, and counted by itself
        what = replace(what, head=False, head_bias=False)
    return replace(what, in_prompt=True) if setting.trained_tokens else what


def recomputed(architecture: Architecture, setting: Setting) -> int:
    """Blocks below this one are computed again in the backward pass, as far as it reaches."""
    if not setting.gradient_checkpointing:
        return 0
    if setting.checkpointed_blocks is None:
        return architecture.layers
    blocks = trained(architecture, setting).blocks
    first = next((index for index, block in enumerate(blocks) if block.any), 0)
    return min(architecture.layers, first + setting.checkpointed_blocks)


def recomputed_share(architecture: Architecture, setting: Setting) -> float:
    """Of the blocks that the backward pass reaches, the share that is computed again."""
    reached = architecture.layers - trained(architecture, setting).lowest
    return max(0, recomputed(architecture, setting) - architecture.layers + reached) / reached if reached else 0.0


@lru_cache(maxsize=64)
def _trained(
    architecture: Architecture,
    method: str,
    target_modules: str | tuple[str, ...],
    chosen: Literal["all"] | tuple[int, ...],
    top_layers: int,
    train_head: bool,
    patterns: tuple[str, ...],
) -> Trained:
    total, every = architecture.layers, chosen == "all"
    layers = tuple(range(total)) if chosen == "all" else chosen
    if method in PROMPTS:
        return Trained((Touched(),) * total, in_prompt=True)
    if method not in PARTIAL:
        names = frozenset(linear.name for linear in adapted_linears(architecture, target_modules))
        return Trained(_in(total, layers, Touched(adapted=names)))
    if method == "patterns":
        return _matching(architecture, patterns)
    norms, with_shift = (_norms_with(architecture, vectors) for vectors in (1, 2))
    if method == "norms":
        touched = Touched(norms=norms, norm_biases=with_shift)
        return Trained(_in(total, layers, touched), norm=every, norm_bias=every)
    inside = [linear for linear in architecture.linears if in_blocks(architecture, linear)]
    with_bias = frozenset(linear.name for linear in inside if linear.bias)
    if method == "bias_only":
        biases = architecture.family.norm_weights == 2
        touched = Touched(biases=with_bias, norm_biases=with_shift)
        return Trained(_in(total, layers, touched), norm_bias=biases and every, head_bias=every)
    names = frozenset(linear.name for linear in inside)
    whole = Touched(weights=names, biases=with_bias, norms=norms, norm_biases=with_shift, experts=True)
    if method == "full":
        return Trained((whole,) * total, True, True, True, True, not architecture.tied, True, True)
    top = tuple(range(total - top_layers, total))
    head = train_head
    return Trained(_in(total, top, whole), norm=head, norm_bias=head, head=head, head_bias=head)


def adapted_linears(architecture: Architecture, target_modules: str | tuple[str, ...]) -> tuple[Linear, ...]:
    """The linear layers that an adapter goes on; `auto` are IA3's: keys, values and the MLP's last.

    Raises BaseError when an ending fits none.
    """
    if target_modules != "auto":
        return architecture.targets(target_modules)
    family = architecture.family
    wanted = {*(family.qkv if len(family.qkv) == 1 else family.qkv[1:]), feed_forward(architecture)}
    return tuple(linear for linear in architecture.linears if {linear.name, linear.name.rpartition(".")[2]} & wanted)


def feed_forward(architecture: Architecture) -> str:
    """The layer whose input IA3 scales: the MLP's last."""
    family = architecture.family
    return f"{family.mlp}.{family.down}" if family.mlp else family.down


def _norms_with(architecture: Architecture, vectors: int) -> frozenset[str]:
    """Norms of a block that have a weight (1), or a bias too (2)."""
    return frozenset(norm.name for norm in block_norms(architecture) if norm.vectors >= vectors)


def in_blocks(architecture: Architecture, linear: Linear) -> bool:
    """Whether the blocks have this layer; OPT-350M has two outside of them."""
    return linear.name not in ("project_in", "project_out")


def _in(total: int, layers: tuple[int, ...], touched: Touched) -> tuple[Touched, ...]:
    chosen = set(layers)
    return tuple(touched if index in chosen else Touched() for index in range(total))


def _matching(architecture: Architecture, patterns: tuple[str, ...]) -> Trained:
    """Tensors by name."""
    family, names = architecture.family, architecture.family.names
    norms, with_shift = (_norms_with(architecture, vectors) for vectors in (1, 2))

    def fits(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def block(index: int) -> Touched:
        path = f"{names.blocks}.{index}."
        inside = [linear for linear in architecture.linears if in_blocks(architecture, linear)]
        return Touched(
            weights=frozenset(linear.name for linear in inside if fits(f"{path}{linear.name}.weight")),
            biases=frozenset(linear.name for linear in inside if linear.bias and fits(f"{path}{linear.name}.bias")),
            norms=frozenset(name for name in norms if fits(f"{path}{name}.weight")),
            norm_biases=frozenset(name for name in with_shift if fits(f"{path}{name}.bias")),
            experts=fits(f"{path}{family.mlp}.experts.gate_up_proj"),
        )

    embedding, head = fits(f"{names.embedding}.weight"), fits(f"{names.head}.weight")
    return Trained(
        tuple(block(index) for index in range(architecture.layers)),
        embedding=embedding,
        positions=fits(f"{names.positions}.weight"),
        norm=fits(f"{names.norm}.weight"),
        norm_bias=family.norm_weights == 2 and fits(f"{names.norm}.bias"),
        head=head and not (architecture.tied and embedding),
        head_bias=family.head_bias and fits(f"{names.head}.bias"),
    )


def chosen_tensors(architecture: Architecture, what: Trained) -> Iterator[tuple[int, int]]:
    """Entries of the base's own tensors that are trained, and how many tensors have as many."""
    for linear in architecture.linears:
        if in_blocks(architecture, linear):
            shares = (what.share(linear.name, each) for each in ("weights", "biases"))
            weights, biases = (_of(architecture, linear, share) for share in shares)
        else:
            weights, biases = (linear.count, linear.count if linear.bias else 0) if what.outside else (0, 0)
        yield linear.out * linear.into, weights
        yield linear.out, biases
    positions = architecture.position_parameters
    words = architecture.embedding_parameters - positions
    yield words, int(what.embedding)
    yield positions, int(what.positions and positions > 0)
    yield words, int(what.head)
    yield architecture.vocabulary, int(what.head_bias and architecture.family.head_bias)
    yield from _norms(architecture, what)
    if architecture.experts and architecture.experts.layers:
        layers = architecture.experts.layers
        share = sum(block.experts for block in what.blocks) * layers // architecture.layers
        yield architecture.expert_parameters // layers, share


def _of(architecture: Architecture, linear: Linear, blocks: int) -> int:
    """How many layers of one name stand in so many of the blocks: in a mixture of experts, not every block has one."""
    return linear.count * blocks // architecture.layers


def _norms(architecture: Architecture, what: Trained) -> Iterator[tuple[int, int]]:
    for norm in block_norms(architecture):
        yield norm.entries, what.share(norm.name, "norms")
        yield norm.entries, what.share(norm.name, "norm_biases")
    if architecture.final_norm:
        vectors = architecture.family.norm_weights
        yield architecture.hidden, int(what.norm and vectors >= 1) + int(what.norm_bias and vectors == 2)
