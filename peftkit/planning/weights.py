"""What lies in memory between steps: weights as they are held, adapter, gradients, optimizer states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.planning.architecture import Architecture, Linear
from peftkit.planning.factors import adapter_tensors, fixed_bytes
from peftkit.planning.layers import FLOAT32, SIZES
from peftkit.planning.ranges import Part, Range, exactly
from peftkit.planning.setting import PARTIAL, Setting
from peftkit.planning.trained import chosen_tensors, trained

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
    packed = list(_packed(architecture, setting))
    count = sum(linear.out * linear.into * times for linear, times in packed)
    if bits == 4:
        codes = sum(-(-linear.out * linear.into // 2) * times for linear, times in packed)
        yield Part("linear layers", exactly(codes), f"{count:,} weights in 4 bits")
    else:
        width = 1 if bits == 8 else size
        yield Part("linear layers", exactly(count * width), f"{count:,} weights × {width} B")
    if dense := architecture.linear_parameters - count:
        yield Part("unpacked linear layers", exactly(dense * size), f"{dense:,} weights in {name}, which are trained")
    yield from _constants(packed, setting, bits)
    for part, numbers in (
        ("embeddings", architecture.embedding_parameters),
        ("head", architecture.head_parameters + _task_parameters(architecture)),
        ("experts", architecture.expert_parameters),
        ("norms and biases", architecture.norm_parameters + architecture.bias_parameters),
    ):
        if numbers:
            yield Part(part, exactly(numbers * size), f"{numbers:,} numbers in {name}")


def held_bits(architecture: Architecture, setting: Setting) -> int:
    """Bits of a linear weight: bitsandbytes never gets Falcon's, and a full fine-tune quantizes nothing."""
    return setting.bits if architecture.family.quantizable and setting.method != "full" else 16


def _packed(architecture: Architecture, setting: Setting) -> Iterator[tuple[Linear, int]]:
    """Linear layers as `bits` says, and how many there are; those that are trained are unpacked ones."""
    what = trained(architecture, setting) if held_bits(architecture, setting) in (4, 8) else None
    for linear in architecture.linears:
        apart = linear.count * what.share(linear.name, "weights") // architecture.layers if what else 0
        yield linear, linear.count - apart


def _constants(packed: list[tuple[Linear, int]], setting: Setting, bits: int) -> Iterator[Part]:
    matrices = sum(times for _, times in packed)
    if bits == 8:
        rows = sum(linear.out * times for linear, times in packed)
        yield Part("quantization constants", exactly(rows * FLOAT32), f"{rows:,} rows × one float32 scale")
    elif bits == 4:
        total = sum(_block_constants(linear.out * linear.into, setting) * times for linear, times in packed)
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
    what = trained(architecture, setting)
    partial = setting.method in PARTIAL
    tensors = chosen_tensors(architecture, what) if partial else adapter_tensors(architecture, setting, what)
    yield from ((numbers, count) for numbers, count in tensors if numbers and count)
    if task := architecture.task:
        yield task.outputs * architecture.hidden, 1
        if task.bias:
            yield task.outputs, 1


def _task_parameters(architecture: Architecture) -> int:
    return architecture.task.parameters(architecture.hidden) if architecture.task else 0


def trained_parameters(architecture: Architecture, setting: Setting) -> int:
    """How many numbers training changes."""
    return sum(numbers * count for numbers, count in trained_tensors(architecture, setting))


def trained_size(setting: Setting) -> int:
    """Bytes of a trained number: float32 whatever the base is, but for weights that are trained in place."""
    return SIZES[setting.dtype] if setting.in_place else FLOAT32


def beside(architecture: Architecture, setting: Setting) -> Part:
    """What stands beside the base: the adapter, or the float32 copies of the tensors that are trained."""
    count = 0 if setting.in_place else trained_parameters(architecture, setting)
    if setting.method in PARTIAL and not setting.in_place:
        return Part("trained copies", exactly(count * FLOAT32), f"{count:,} parameters × 4 B")
    fixed = 0 if setting.in_place else fixed_bytes(architecture, setting)
    more = f", and {fixed:,} B that stay as they are" if fixed else ""
    return Part("adapter", exactly(count * FLOAT32 + fixed), f"{count:,} parameters × 4 B{more}")


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


def kept_beside(architecture: Architecture, setting: Setting) -> Iterator[Part]:
    """What else a method or a regularizer keeps while it trains, as many numbers as are trained or more."""
    count = trained_parameters(architecture, setting)
    if setting.method == "adalora":  # `RankAllocator` in peft: ipt, exp_avg_ipt, exp_avg_unc
        yield Part("scores of ranks", exactly(3 * FLOAT32 * count), f"{count:,} parameters × 12 B")
    if setting.starts:
        yield Part("where training began", exactly(FLOAT32 * count * setting.starts), f"{count:,} parameters × 4 B")
    if setting.mixout:  # the mixture and the mask that it was made with
        matrices = sum(numbers * times for numbers, times in trained_tensors(architecture, setting))
        yield Part("mixtures", Range(0, 5 * matrices, 5 * matrices), f"{matrices:,} parameters × 5 B, in a pass")


def trunk(architecture: Architecture, setting: Setting) -> int:
    """Bytes of the frozen weights below the lowest trained tensor; a tied embedding stays, for the head reads it."""
    share = trained(architecture, setting).lowest / architecture.layers
    alone = replace(architecture, linears=tuple(_below(architecture, trained(architecture, setting).lowest)))
    untouched = replace(setting, method="lora")  # what is trained does not lie below
    linears = ("linear layers", "quantization constants", "code tables")
    packed = sum(part.bytes.expected for part in weights(alone, untouched) if part.name in linears)
    plain = (architecture.other_parameters) * share
    plain += 0 if architecture.tied else architecture.embedding_parameters
    return packed + int(plain * SIZES[setting.dtype])


def _below(architecture: Architecture, blocks: int) -> Iterator[Linear]:
    for linear in architecture.linears:
        yield replace(linear, count=linear.count * blocks // architecture.layers)


def _eight_bit(numbers: int) -> int:
    if numbers < SMALL:
        return 2 * FLOAT32 * numbers
    return 2 * numbers + 2 * FLOAT32 * -(-numbers // SECOND_BLOCK)


def update_scratch(architecture: Architecture, setting: Setting) -> int:
    """Bytes that the update of the weights needs: square roots of all (CUDA's multi-tensor AdamW), or of one tensor.

    Tensor by tensor the quotient beside the root is a second one (`_single_tensor_adam` in torch/optim/adam.py).
    """
    if setting.method == "adalora":  # the penalty's gradients are computed beside the loss's
        return trained_parameters(architecture, setting) * FLOAT32
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
