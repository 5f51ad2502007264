"""What lies in memory between steps: weights as they are held, adapter, gradients, optimizer states."""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.planning.architecture import Architecture
from peftkit.planning.layers import FLOAT32, SIZES
from peftkit.planning.ranges import Part, Range, exactly
from peftkit.planning.setting import Setting

BLOCK = 64
"""Weights that share one constant (`backbone.quantize.BLOCK`)."""
SECOND_BLOCK = 256
"""Constants that share one constant, with double quantization (QLoRA, section 3)."""
SMALL = 4096
"""bitsandbytes keeps 32-bit states for tensors with fewer entries (`optim/optimizer.py`, min_8bit_size)."""
PAGED = 100_000
"""bitsandbytes pages states of tensors with as many entries (`get_state_buffer`)."""


def weights(architecture: Architecture, setting: Setting) -> Iterator[Part]:
    """The base as it is held. 4-bit codes and constants are counted matrix by matrix, rounded up as they are stored."""
    size, name = SIZES[setting.dtype], setting.dtype
    bits = held_bits(architecture, setting)
    count = architecture.linear_parameters
    if bits == 4:
        codes = sum(-(-linear.out * linear.into // 2) * linear.count for linear in architecture.linears)
        yield Part("linear layers", exactly(codes), f"{count:,} weights in 4 bits")
    else:
        width = 1 if bits == 8 else size
        yield Part("linear layers", exactly(count * width), f"{count:,} weights × {width} B")
    yield from _constants(architecture, setting, bits)
    for part, numbers in (
        ("embeddings", architecture.embedding_parameters),
        ("head", architecture.head_parameters),
        ("experts", architecture.expert_parameters),
        ("norms and biases", architecture.norm_parameters + architecture.bias_parameters),
    ):
        if numbers:
            yield Part(part, exactly(numbers * size), f"{numbers:,} numbers in {name}")


def held_bits(architecture: Architecture, setting: Setting) -> int:
    """Bits of a linear weight: bitsandbytes never gets Falcon's, and a full fine-tune quantizes nothing."""
    return setting.bits if architecture.family.quantizable and setting.method != "full" else 16


def _constants(architecture: Architecture, setting: Setting, bits: int) -> Iterator[Part]:
    matrices = sum(linear.count for linear in architecture.linears)
    if bits == 8:
        rows = sum(linear.out * linear.count for linear in architecture.linears)
        yield Part("quantization constants", exactly(rows * FLOAT32), f"{rows:,} rows × one float32 scale")
    elif bits == 4:
        total = sum(
            _block_constants(linear.out * linear.into, setting) * linear.count for linear in architecture.linears
        )
        per = "8 bits per 64 weights, float32 per 16,384" if setting.double_quant else "float32 per 64 weights"
        yield Part("quantization constants", exactly(total), per)
        tables = matrices * (16 + (256 if setting.double_quant else 0)) * FLOAT32
        yield Part("code tables", Range(matrices * 16 * FLOAT32, tables, tables), f"{matrices:,} matrices")


def _block_constants(count: int, setting: Setting) -> int:
    blocks = -(-count // BLOCK)
    if not setting.double_quant:
        return blocks * FLOAT32
    return blocks + -(-blocks // SECOND_BLOCK) * FLOAT32 + FLOAT32


def trained_tensors(architecture: Architecture, setting: Setting) -> Iterator[tuple[int, int]]:
    """Entries of every trained tensor, and how many tensors have as many."""
    if setting.method == "full":
        for linear in architecture.linears:
            yield linear.out * linear.into, linear.count
            if linear.bias:
                yield linear.out, linear.count
        positions = architecture.position_parameters
        for numbers in (architecture.embedding_parameters - positions, positions, architecture.head_parameters):
            if numbers:
                yield numbers, 1
        yield from _norm_tensors(architecture)
        if architecture.experts and architecture.experts.layers:
            layers = architecture.experts.layers
            yield architecture.expert_parameters // layers, layers
        return
    for linear in architecture.targets(setting.target_modules):
        yield setting.r * linear.into, linear.count
        yield setting.r * linear.out, linear.count
        if setting.method == "dora":
            yield linear.out, linear.count


def _norm_tensors(architecture: Architecture) -> Iterator[tuple[int, int]]:
    whole, rest = divmod(architecture.norm_parameters, architecture.hidden)
    yield architecture.hidden, whole
    if rest:
        yield rest, 1
    biases = sum(linear.out * linear.count for linear in architecture.linears if linear.bias)
    if architecture.bias_parameters > biases:
        yield architecture.bias_parameters - biases, 1


def trained_parameters(architecture: Architecture, setting: Setting) -> int:
    """How many numbers training changes."""
    return sum(numbers * count for numbers, count in trained_tensors(architecture, setting))


def trained_size(setting: Setting) -> int:
    """Bytes of a trained number: adapters are float32 whatever the base is."""
    return SIZES[setting.dtype] if setting.method == "full" else FLOAT32


def adapter(architecture: Architecture, setting: Setting) -> Part:
    """What is injected."""
    count = 0 if setting.method == "full" else trained_parameters(architecture, setting)
    return Part("adapter", exactly(count * FLOAT32), f"{count:,} parameters × 4 B")


def gradients(architecture: Architecture, setting: Setting) -> Part:
    """One gradient for every trained number, in its dtype."""
    count, size = trained_parameters(architecture, setting), trained_size(setting)
    return Part("gradients", exactly(count * size), f"{count:,} parameters × {size} B")


def optimizer(architecture: Architecture, setting: Setting) -> Part:
    """States between steps. Paged states may leave the device: they count in `high` only."""
    tensors = list(trained_tensors(architecture, setting))
    count = sum(numbers * times for numbers, times in tensors)
    if setting.optim == "sgd":
        return Part("optimizer", exactly(0), "plain SGD has no state")
    if setting.optim in ("adamw_torch", "adamw_torch_fused"):
        size = 2 * trained_size(setting)
        return Part("optimizer", exactly(count * size), f"{count:,} parameters × {size} B")
    total = sum(_eight_bit(numbers) * times for numbers, times in tensors)
    formula = f"{count:,} parameters × 2 B, float32 per {SECOND_BLOCK} of each state"
    if setting.optim == "paged_adamw_8bit" and setting.device == "cuda":
        stays = sum(_eight_bit(numbers) * times for numbers, times in tensors if numbers < PAGED)
        return Part("optimizer", Range(stays, total, total), formula + ", paged")
    return Part("optimizer", exactly(total), formula)


def _eight_bit(numbers: int) -> int:
    if numbers < SMALL:
        return 2 * FLOAT32 * numbers
    return 2 * numbers + 2 * FLOAT32 * -(-numbers // SECOND_BLOCK)


def update_scratch(architecture: Architecture, setting: Setting) -> int:
    """Bytes that the update of the weights needs: square roots of all (CUDA's multi-tensor AdamW), or of one tensor.

    Tensor by tensor the quotient beside the root is a second one (`_single_tensor_adam` in torch/optim/adam.py).
    """
    if setting.optim != "adamw_torch":
        return 0
    sizes = [numbers for numbers, _ in trained_tensors(architecture, setting)]
    if setting.device == "cuda":
        return trained_parameters(architecture, setting) * trained_size(setting)
    return 2 * max(sizes, default=0) * trained_size(setting)


def largest_tensor(architecture: Architecture) -> int:
    """Entries of the base's largest tensor."""
    linears = max(linear.out * linear.into for linear in architecture.linears)
    experts = architecture.experts
    stacked = 2 * experts.count * experts.intermediate * architecture.hidden if experts else 0
    return max(linears, stacked, architecture.vocabulary * architecture.hidden)
