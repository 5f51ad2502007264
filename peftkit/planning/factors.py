"""The shapes of what each method puts beside a linear layer, as PEFT 0.21 makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peftkit.planning.architecture import Architecture, Linear
from peftkit.planning.setting import Setting
from peftkit.planning.trained import Trained, adapted_linears, feed_forward


@dataclass(frozen=True)
class Kronecker:
    """Shapes of LoKr's two factors, and whether the large one is a product of rank r."""

    small: tuple[int, int]
    large: tuple[int, int]
    split: bool


def rank(setting: Setting) -> int:
    """The rank that the adapter computes with: PiSSA's frozen half stands beside the trained one."""
    return 2 * setting.r if setting.method == "pissa" else setting.r


def scales_inputs(architecture: Architecture, setting: Setting, linear: Linear) -> bool:
    """Whether IA3 scales a layer's inputs instead of its outputs."""
    if setting.target_modules == "auto":
        return linear.name == feed_forward(architecture)
    return any(f".{linear.name}".endswith(f".{ending}") for ending in setting.feedforward_modules)


def kronecker(setting: Setting, linear: Linear) -> Kronecker:
    """`tuners/lokr/layer.py`, update_layer with decompose_both=False."""
    sides = (_halves(size, setting.decompose_factor) for size in (linear.out, linear.into))
    (small_out, out), (small_into, into) = sides
    return Kronecker((small_out, small_into), (out, into), setting.r < max(out, into) / 2)


def _halves(size: int, factor: int) -> tuple[int, int]:
    """Two factors of `size`: the smaller is `factor` if that divides it, or the largest one of at most so much."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = size if factor == -1 else factor
    least = max(each for each in range(1, int(size**0.5) + 1) if size % each == 0 and each <= max(1, bound))
    return least, size // least


def block_size(into: int, asked: int) -> int:
    """Rows of one rotation: the divisor of the width nearest to what was asked for (`adjust_oft_parameters`)."""
    if asked >= into:
        return into
    lower = max(each for each in range(1, asked + 1) if into % each == 0)
    higher = min(each for each in range(asked, into + 1) if into % each == 0)
    return lower if asked - lower <= higher - asked else higher


def largest_shape(linears: tuple[Linear, ...]) -> tuple[int, int]:
    """Rows and columns that VeRA's shared matrices cover."""
    return max(linear.out for linear in linears), max(linear.into for linear in linears)


def adapter_tensors(architecture: Architecture, setting: Setting, what: Trained) -> Iterator[tuple[int, int]]:
    """Entries of every trained tensor of an adapter, and how many tensors have as many."""
    method, hidden = setting.method, architecture.hidden
    if method == "prompt_tuning":
        yield setting.num_virtual_tokens * hidden, 1
    elif method == "prefix_tuning":
        yield setting.num_virtual_tokens * architecture.layers * 2 * architecture.keys, 1
    elif method != "trainable_tokens":
        for linear in adapted_linears(architecture, setting.target_modules):
            count = linear.count * what.share(linear.name, "adapted") // architecture.layers
            for numbers in _tensors(architecture, setting, linear):
                yield numbers, count
    yield setting.trained_tokens * hidden, 1


def _tensors(architecture: Architecture, setting: Setting, linear: Linear) -> Iterator[int]:
    method, r = setting.method, rank(setting)
    if method == "ia3":
        yield linear.into if scales_inputs(architecture, setting, linear) else linear.out
    elif method == "vera":
        yield from (linear.out, r)
    elif method == "loha":
        yield from (r * linear.out, r * linear.into) * 2
    elif method == "lokr":
        shapes = kronecker(setting, linear)
        yield shapes.small[0] * shapes.small[1]
        yield from (r * shapes.large[0], r * shapes.large[1]) if shapes.split else (shapes.large[0] * shapes.large[1],)
    elif method == "oft":
        size = block_size(linear.into, setting.oft_block_size)
        yield linear.into // size * (size * (size - 1) // 2)
    else:
        yield from (r * linear.into, r * linear.out)
        if method in ("dora", "adalora"):  # one length for every output, one singular value for every direction
            yield linear.out if method == "dora" else r


def fixed_bytes(architecture: Architecture, setting: Setting) -> int:
    """Bytes that an adapter holds and does not train."""
    method = setting.method
    rows = setting.trained_tokens * architecture.hidden * 4  # as they were
    if method in ("prompt_tuning", "prefix_tuning"):  # ids of the virtual tokens
        return setting.num_virtual_tokens * 8
    if method not in ("vera", "oft", "adalora"):
        return rows
    linears = adapted_linears(architecture, setting.target_modules)
    if method == "vera":
        return shared_bytes(architecture, setting)
    blocks = architecture.layers if setting.layers == "all" else len(setting.layers)
    counts = [(linear, linear.count * blocks // architecture.layers) for linear in linears]
    if method == "adalora":  # the rank that is left, as a number
        return sum(count for _, count in counts) * 4
    sizes = ((block_size(linear.into, setting.oft_block_size), count) for linear, count in counts)
    return sum(size * (size - 1) * 8 * count for size, count in sizes)  # rows and columns of the entries, as int64


def shared_bytes(architecture: Architecture, setting: Setting) -> int:
    """Bytes of VeRA's shared matrices, which are stored with the adapter though they are not trained."""
    if setting.method != "vera":
        return 0
    return sum(largest_shape(adapted_linears(architecture, setting.target_modules))) * setting.r * 4


def cast_parameters(architecture: Architecture, setting: Setting, what: Trained) -> int:
    """Entries of the trained matrices that a product reads as they are, and autocast as a 16-bit copy."""
    if setting.method in ("ia3", "vera", "oft", "prompt_tuning", "prefix_tuning", "trainable_tokens"):
        return 0
    total = 0
    for linear in adapted_linears(architecture, setting.target_modules):
        count = linear.count * what.share(linear.name, "adapted") // architecture.layers
        sizes = list(_tensors(architecture, setting, linear))
        if setting.method == "dora":
            sizes = sizes[:2]
        elif setting.method == "adalora":  # lora_A goes in through its product with the singular values
            sizes = sizes[1:2]
        elif setting.method == "lokr":  # the Kronecker product is no matrix product
            sizes = sizes[1:] if len(sizes) == 3 else []
        total += sum(sizes) * count
    return total


def products(architecture: Architecture, setting: Setting, what: Trained) -> tuple[int, int]:
    """Multiplications that a token meets in the adapter, and those of them whose factor is trained."""
    method, total, trained = setting.method, 0, 0
    if method in ("prompt_tuning", "prefix_tuning", "trainable_tokens"):
        return 0, 0
    for linear in adapted_linears(architecture, setting.target_modules):
        count = linear.count * what.share(linear.name, "adapted") // architecture.layers
        if method in ("loha", "lokr"):  # the delta weight is a matrix like the layer's own
            each = linear.out * linear.into
        elif method == "oft":
            each = linear.into * block_size(linear.into, setting.oft_block_size)
        elif method == "vera":
            each = setting.r * (linear.out + linear.into)
        else:
            each = sum(_tensors(architecture, setting, linear))
        total += each * count
        trained += sum(_tensors(architecture, setting, linear)) * count if method == "vera" else each * count
    return total, trained
