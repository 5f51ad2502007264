"""What a setting trains: in every block, and around the blocks; the same choice as `tuning.partial` and PEFT make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from peftkit.planning.architecture import Architecture, Linear
from peftkit.planning.setting import PARTIAL, PROMPTS, Setting

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Touched:
    """What is trained in one block: names of its linear layers, and its norms."""

    adapted: frozenset[str] = _NONE
    """Layers with an adapter."""
    weights: frozenset[str] = _NONE
    """Layers whose own weight is trained."""
    biases: frozenset[str] = _NONE
    """Layers whose own bias is trained."""
    norms: bool = False
    norm_biases: bool = False
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
        """In how many blocks a linear layer is `adapted`, or its `weights` or `biases` are trained."""
        return sum(name in getattr(block, what) for block in self.blocks)


def trained(architecture: Architecture, setting: Setting) -> Trained:
    """What a setting trains. Raises BaseError when an ending of target_modules fits no layer."""
    layers = tuple(range(architecture.layers)) if setting.layers == "all" else setting.layers
    modules, patterns = setting.target_modules, setting.patterns
    what = _trained(architecture, setting.method, modules, layers, setting.top_layers, setting.train_head, patterns)
    return replace(what, in_prompt=True) if setting.trained_tokens else what


@lru_cache(maxsize=64)
def _trained(
    architecture: Architecture,
    method: str,
    target_modules: str | tuple[str, ...],
    layers: tuple[int, ...],
    top_layers: int,
    train_head: bool,
    patterns: tuple[str, ...],
) -> Trained:
    total = architecture.layers
    if method in PROMPTS:
        return Trained((Touched(),) * total, in_prompt=True)
    if method not in PARTIAL:
        names = frozenset(linear.name for linear in adapted_linears(architecture, method, target_modules))
        return Trained(_in(total, layers, Touched(adapted=names)))
    if method == "patterns":
        return _matching(architecture, patterns)
    every = len(layers) == total
    if method == "norms":
        touched = Touched(norms=True, norm_biases=True)
        return Trained(_in(total, layers, touched), norm=every, norm_bias=every)
    inside = [linear for linear in architecture.linears if in_blocks(architecture, linear)]
    with_bias = frozenset(linear.name for linear in inside if linear.bias)
    if method == "bias_only":
        biases = architecture.family.norm_weights == 2
        touched = Touched(biases=with_bias, norm_biases=biases)
        return Trained(_in(total, layers, touched), norm_bias=biases and every, head_bias=every)
    names = frozenset(linear.name for linear in inside)
    whole = Touched(weights=names, biases=with_bias, norms=True, norm_biases=True, experts=True)
    if method == "full":
        return Trained((whole,) * total, True, True, True, True, not architecture.tied, True, True)
    top = tuple(range(total - top_layers, total))
    head = train_head
    return Trained(_in(total, top, whole), norm=head, norm_bias=head, head=head, head_bias=head)


def adapted_linears(
    architecture: Architecture, method: str, target_modules: str | tuple[str, ...]
) -> tuple[Linear, ...]:
    """The linear layers that an adapter's method goes on; with IA3, `all-linear` are keys, values and the MLP's last.

    Raises BaseError when an ending fits none.
    """
    if method != "ia3" or target_modules != "all-linear":
        return architecture.targets(target_modules)
    family = architecture.family
    wanted = {*(family.qkv if len(family.qkv) == 1 else family.qkv[1:]), feed_forward(architecture)}
    return tuple(linear for linear in architecture.linears if {linear.name, linear.name.rpartition(".")[2]} & wanted)


def feed_forward(architecture: Architecture) -> str:
    """The layer whose input IA3 scales: the MLP's last."""
    family = architecture.family
    return f"{family.mlp}.{family.down}" if family.mlp else family.down


def in_blocks(architecture: Architecture, linear: Linear) -> bool:
    """Whether the blocks have this layer; OPT-350M has two outside of them."""
    return linear.name not in ("project_in", "project_out")


def _in(total: int, layers: tuple[int, ...], touched: Touched) -> tuple[Touched, ...]:
    chosen = set(layers)
    return tuple(touched if index in chosen else Touched() for index in range(total))


def _matching(architecture: Architecture, patterns: tuple[str, ...]) -> Trained:
    """Tensors by name; a norm of a block counts as all norms of it."""
    family, names = architecture.family, architecture.family.names

    def fits(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def block(index: int) -> Touched:
        path = f"{names.blocks}.{index}."
        inside = [linear for linear in architecture.linears if in_blocks(architecture, linear)]
        return Touched(
            weights=frozenset(linear.name for linear in inside if fits(f"{path}{linear.name}.weight")),
            biases=frozenset(linear.name for linear in inside if linear.bias and fits(f"{path}{linear.name}.bias")),
            norms=any(fits(f"{path}{norm}.weight") for norm in names.norms),
            norm_biases=family.norm_weights == 2 and any(fits(f"{path}{norm}.bias") for norm in names.norms),
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
    vectors = architecture.family.norm_weights
    if not vectors:
        return
    hidden, total = architecture.hidden, architecture.layers
    final = 1 if architecture.final_norm else 0
    per_block = architecture.norm_parameters // vectors - final * hidden  # entries of one kind in all blocks
    whole, rest = divmod(per_block // total, hidden)
    for trained_in, at_end in (("norms", what.norm), ("norm_biases", what.norm_bias)):
        if trained_in == "norm_biases" and vectors != 2:
            continue
        blocks = sum(getattr(block, trained_in) for block in what.blocks)
        yield hidden, whole * blocks + (final if at_end else 0)
        yield rest, blocks if rest else 0
