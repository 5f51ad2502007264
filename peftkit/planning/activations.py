"""What a training step keeps and needs besides weights: a decoder written on a tape and walked back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

from peftkit.planning.architecture import Architecture
from peftkit.planning.backward import Backward, Trace
from peftkit.planning.block import Block, forward_pass
from peftkit.planning.factors import cast_parameters
from peftkit.planning.head import head
from peftkit.planning.layers import FLOAT32, SIZES, Layers
from peftkit.planning.passes import Passes, training_passes
from peftkit.planning.setting import PARTIAL, Setting
from peftkit.planning.tape import Tape
from peftkit.planning.tokens import accumulates, labelled_tokens, micro_batch_tokens
from peftkit.planning.trained import recomputed, recomputed_share, trained


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
    passes: Passes
    tokens: int
    labelled: int
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
    plain = replace(plain, micro_batch=1, row_copies=1, labelled=1)
    passes = training_passes(architecture, setting)
    masked = not passes.flat and (masked or architecture.family.always_masked or setting.method == "prefix_tuning")
    tokens, labelled = (count * setting.row_copies for count in (micro_batch_tokens(setting), labelled_tokens(setting)))
    case = _Case(architecture, plain, passes, tokens, labelled, masked, accumulates(setting))
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
    again = max(0, recomputed(case.architecture, case.setting) - lowest)
    if len(kinds) == 1 and (total - lowest > 3 or lowest == 0):
        trace = _of_alike(case, again, total - lowest - again)
    else:
        trace = _trace(case, range(lowest, total), again)
        trace = replace(trace, turn=max(trace.turn, trace.between))
    kept, scoring, block = trace.kept, trace.head, max(trace.block, trace.turn)
    bottom, forward = trace.bottom, trace.forward
    forward = max(forward, _forward_peak(case, lowest, kept))
    return Activations(kept, scoring - kept, max(0, block - kept), max(scoring, block, bottom, forward))


def _forward_peak(case: _Case, lowest: int, kept: int) -> int:
    """What a forward pass needs where that may be more than the backward pass: no graph, or a cache that ends with it.

    `kept` are the bytes that the blocks keep. A cache of virtual tokens holds the keys and values of all layers; at the
    end of the last one they are there with the widest product and the streams around it.
    """
    architecture, setting = case.architecture, case.setting
    rows, length = math.ceil(case.tokens / setting.longest), setting.longest
    if setting.method == "prefix_tuning":
        size = SIZES[setting.compute_dtype]
        cache = 2 * architecture.layers * rows * (length + setting.num_virtual_tokens) * architecture.keys
        widest = max(linear.out * linear.into for linear in architecture.linears) if setting.bits in (4, 8) else 0
        streams = rows * length * (architecture.intermediate + 4 * architecture.hidden)
        return kept + size * (cache + widest + streams)
    if not lowest or setting.trunk_cache:
        return 0
    return forward_pass(architecture, setting, case.tokens, length, 0, masked=case.masked, passes=case.passes)


def _of_alike(case: _Case, again: int, once: int) -> Trace:
    """So many blocks that are computed again, and behind them others that are not, by proportion."""
    last = case.architecture.layers - 1
    start = (2 if again else 0, 2 if once else 0)
    base = _trace(case, [last] * sum(start), start[0])
    values = astuple(base)
    for at, count in enumerate((again, once)):
        if count:
            more = (start[0] + (at == 0), start[1] + (at == 1))
            longer = astuple(_trace(case, [last] * sum(more), more[0]))
            values = tuple(
                value + (high - low) * (count - 2)
                for value, low, high in zip(values, astuple(base), longer, strict=True)
            )
    return Trace(*values)


def _trace(case: _Case, blocks: Sequence[int], again: int) -> Trace:
    """Walk blocks like these between the embedding and the head; what the head keeps is not in `kept`.

    The first `again` of them are checkpointed.
    """
    setting, tape = case.setting, Tape()
    layers = Layers(tape, case.architecture, setting, case.tokens, setting.longest, case.passes)
    block = Block(layers, case.masked)
    x = block.embed()
    batch = tape.fresh(3 * layers.words, 8)  # ids, labels, and mask or positions
    tables = tape.fresh(2 * layers.positions * case.architecture.head_dim if block.family.rotary else 0, x.size)
    kinds = 1 + (layers.eager and 0 < case.architecture.sliding_layers < case.architecture.layers)
    mask = tape.fresh(kinds * layers.seen, layers.mask_size(case.masked))  # one for layers that slide
    tape.keep(batch, *([tables, mask] if blocks else []))
    for count, index in enumerate(blocks):
        layers.at(index)
        tape.begin(count < again, x)
        x = block(x)
    layers.at(case.architecture.layers)
    tape.begin(False, x)
    scored = head(layers, block, x, case.labelled)
    trace = Backward(tape, gradients_are_there=case.accumulating).walk(scored.loss, scored.making + _casts(case))
    return replace(trace, kept=trace.kept - scored.kept)


def _casts(case: _Case) -> int:
    """16-bit copies of float32 trained weights: autocast keeps them to the end of the forward pass.

    Without checkpointing the backward pass keeps them, and they are on the tape.
    """
    setting, architecture = case.setting, case.architecture
    size = SIZES[setting.compute_dtype]
    again = recomputed_share(architecture, setting)
    if size == FLOAT32 or not again:
        return 0
    what = trained(architecture, setting)
    if case.passes.fused:  # which casts once more in the backward pass
        return 0
    if setting.method not in PARTIAL:
        return int(again * size * cast_parameters(architecture, setting, what))
    if setting.in_place and setting.dtype != "float32":
        return 0
    layers = architecture.layers
    shares = ((linear, what.share(linear.name, "weights")) for linear in architecture.linears)
    return int(again * size * sum(linear.parameters * share // layers for linear, share in shares))
