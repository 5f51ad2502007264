"""What a training step keeps and needs besides weights: a decoder written on a tape and walked back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

from peftkit.planning.architecture import Architecture
from peftkit.planning.backward import Backward, Trace
from peftkit.planning.block import Block, forward_pass
from peftkit.planning.factors import cast_parameters
from peftkit.planning.layers import FLOAT32, SIZES, Layers
from peftkit.planning.setting import PARTIAL, Setting
from peftkit.planning.tape import Tape, Tensor
from peftkit.planning.trained import trained


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    kept: int
    """What the blocks keep for the backward pass; with checkpointing their inputs, and what int8 layers hold."""
    logits: int
    """What the head adds: logits, their float32 copy, its log-softmax, gradients, and a 16-bit copy of its weight."""
    hump: int
    """What the backward pass of one block adds: gradients, and with checkpointing the block's activations."""
    peak: int
    """The most that is alive at once; gradients of weights included where they were not there before."""


@dataclass(frozen=True)
class _Case:
    """What activations depend on."""

    architecture: Architecture
    setting: Setting
    masked: bool
    accumulating: bool


def activations(architecture: Architecture, setting: Setting, *, masked: bool = False) -> Activations:
    """The activations of a micro-batch of the longest rows; `masked`: its rows are of different lengths.

    Where blocks are alike, three of them are walked and the rest follow by proportion. What lies below the lowest
    trained tensor has no graph.
    """
    # Only what matters, so that settings that differ elsewhere share one answer.
    plain = replace(setting, optim="sgd", rows_per_step=1, activation_offloading=False, double_quant=True)
    plain = replace(plain, evaluation_batch=1, evaluation_longest=1, max_new_tokens=1, starts=0, mixout=False)
    plain = replace(plain, micro_batch=setting.micro_batch * setting.row_copies, row_copies=1)
    masked = masked or architecture.family.always_masked or setting.method == "prefix_tuning"
    case = _Case(architecture, plain, masked, setting.rows_per_step > setting.micro_batch)
    if masked or setting.longest <= architecture.window or not architecture.sliding_layers:
        return _activations(case)
    return _mixed(_activations(case), _activations(replace(case, masked=True)), architecture)


def _mixed(plain: Activations, masked: Activations, architecture: Architecture) -> Activations:
    """Layers that slide need a mask for rows beyond their window; the others need none."""
    share = architecture.sliding_layers / architecture.layers
    kept, logits, hump, peak = (
        int(low + (high - low) * share) for low, high in zip(astuple(plain), astuple(masked), strict=True)
    )
    return Activations(kept, logits, hump, peak)


@lru_cache(maxsize=512)
def _activations(case: _Case) -> Activations:
    what, total = trained(case.architecture, case.setting), case.architecture.layers
    lowest, kinds = what.lowest, set(what.blocks[what.lowest :])
    if len(kinds) == 1 and (total - lowest > 3 or lowest == 0):
        two, three = (_trace(case, [total - 1] * count) for count in (2, 3))
        names = ("kept", "head", "block", "bottom", "forward")
        kept, head, block, bottom, forward = (_at(total - lowest, two, three, name) for name in names)
    else:
        trace = _trace(case, range(lowest, total))
        kept, head, block, bottom = trace.kept, trace.head, max(trace.block, trace.between), trace.bottom
        forward = trace.forward
    # The log-softmax is kept too, but belongs to the logits.
    blocks = kept - FLOAT32 * labelled_positions(case.setting) * case.architecture.vocabulary
    forward = max(forward, _forward_peak(case, lowest, blocks))
    return Activations(blocks, head - blocks, max(0, block - blocks), max(head, block, bottom, forward))


def _forward_peak(case: _Case, lowest: int, kept: int) -> int:
    """What a forward pass needs where that may be more than the backward pass: no graph, or a cache that ends with it.

    `kept` are the bytes that the blocks keep. A cache of virtual tokens holds the keys and values of all layers; at the
    end of the last one they are there with the widest product and the streams around it.
    """
    architecture, setting = case.architecture, case.setting
    rows, length = setting.micro_batch, setting.longest
    if setting.method == "prefix_tuning":
        size = SIZES[setting.compute_dtype]
        cache = 2 * architecture.layers * rows * (length + setting.num_virtual_tokens) * architecture.keys
        widest = max(linear.out * linear.into for linear in architecture.linears) if setting.bits in (4, 8) else 0
        streams = rows * length * (architecture.intermediate + 4 * architecture.hidden)
        return kept + size * (cache + widest + streams)
    trunk = lowest and not setting.trunk_cache
    return forward_pass(architecture, setting, rows, length, 0, case.masked) if trunk else 0


def labelled_positions(setting: Setting) -> int:
    """Positions that the head is computed for in one micro-batch."""
    return setting.micro_batch * min(setting.labelled, setting.longest)


def _at(layers: int, two: Trace, three: Trace, name: str) -> int:
    low, high = getattr(two, name), getattr(three, name)
    return int(low + (high - low) * (layers - 2))


def _trace(case: _Case, blocks: Sequence[int]) -> Trace:
    """Walk blocks like these between the embedding and the head."""
    setting, tape = case.setting, Tape()
    layers = Layers(tape, case.architecture, setting, setting.micro_batch, setting.longest)
    block = Block(layers, case.masked)
    x = block.embed()
    batch = tape.fresh(3 * setting.micro_batch * setting.longest, 8)  # ids, mask and labels
    tables = tape.fresh(2 * layers.length * case.architecture.head_dim if block.family.rotary else 0, x.size)
    seen = layers.length * (layers.length + layers.prefix)
    mask = tape.fresh(setting.micro_batch * seen, layers.mask_size(case.masked))
    tape.keep(batch, *([tables, mask] if blocks else []))
    for index in blocks:
        layers.at(index)
        tape.begin(setting.gradient_checkpointing, x)
        x = block(x)
    layers.at(case.architecture.layers)
    tape.begin(False, x)
    loss, held = _head(layers, block, x)
    return Backward(tape, gradients_are_there=case.accumulating).walk(loss, held + _casts(case))


def _casts(case: _Case) -> int:
    """16-bit copies of float32 trained weights: autocast keeps them to the end of the forward pass.

    Without checkpointing the backward pass keeps them, and they are on the tape.
    """
    setting, architecture = case.setting, case.architecture
    size = SIZES[setting.compute_dtype]
    if size == FLOAT32 or not setting.gradient_checkpointing:
        return 0
    what = trained(architecture, setting)
    if setting.method not in PARTIAL:
        return size * cast_parameters(architecture, setting, what)
    if setting.in_place and setting.dtype != "float32":
        return 0
    layers = architecture.layers
    shares = ((linear, what.share(linear.name, "weights")) for linear in architecture.linears)
    return size * sum(linear.parameters * share // layers for linear, share in shares)


def _head(layers: Layers, block: Block, x: Tensor) -> tuple[Tensor, int]:
    """The loss, and the bytes that only variables hold when it is computed."""
    architecture, setting, tape = layers.architecture, layers.setting, layers.tape
    if architecture.final_norm:
        x = layers.norm(x, layers.final)
    positions = labelled_positions(setting)
    wanted = tape.op([x], positions * architecture.hidden, x.size)
    logits = _logits(layers, block, wanted)
    if architecture.scaled_logits:
        logits = tape.like(logits)
    if architecture.capped_logits:
        logits = tape.like(tape.like(tape.like(logits), saves_output=True))
    precise = tape.cast(logits, FLOAT32)
    chances = tape.like(precise, saves_output=True)
    loss = tape.op([chances], positions, FLOAT32, saves=[chances])
    held = logits.bytes + (precise.bytes if precise is not logits else 0)
    return loss, held


def _logits(layers: Layers, block: Block, x: Tensor) -> Tensor:
    """x times the head: its own weight, the embedding's, or a frozen one."""
    architecture, tape, what = layers.architecture, layers.tape, layers.trained
    read = tape.cast(x, layers.compute) if layers.autocast else x
    count = x.numbers // architecture.hidden * architecture.vocabulary
    numbers = architecture.vocabulary * architecture.hidden
    biases = [layers.weight(architecture.vocabulary, layers.own)] if what.head_bias and block.family.head_bias else []
    if not what.head and (block.table is None or not architecture.tied):
        # Autocast makes a 16-bit copy of a float32 head.
        cast = numbers * layers.compute if read.size < layers.plain else 0
        return tape.op([read, *biases], count, read.size, saves=[tape.fresh(cast, 1)] if read.needs_grad else [])
    matrix = tape.weight(numbers, layers.own) if what.head or block.table is None else block.head_table()
    matrix = tape.cast(matrix, layers.compute) if layers.autocast else matrix
    saves = [read, matrix] if read.needs_grad else [read]
    return tape.op([read, matrix, *biases], count, read.size, saves=saves)
