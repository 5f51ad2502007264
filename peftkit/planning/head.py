"""The head on a tape: what it makes of the states behind the last block, until there is a loss.

By default labelled tokens go through it in chunks, of which one at a time has logits (`training.passes.head`); the
plain way makes the logits of all labelled positions and keeps their log-softmax for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftkit.planning.block import Block
from peftkit.planning.layers import FLOAT32, Layers
from peftkit.planning.shapes import TaskHead
from peftkit.planning.tape import Tensor

LOGITS_BYTES = 1 << 26
"""`training.passes.head.LOGITS_BYTES`: the most that a chunk of logits takes in float32; planning may not import it."""


@dataclass(frozen=True)
class Scored:
    """A loss, and the memory that it takes besides what the blocks keep."""

    loss: Tensor
    kept: int
    """Bytes that the backward pass of the loss needs."""
    making: int
    """Bytes that are there when it is computed, and then given back."""


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that exist at once."""
    return max(1, LOGITS_BYTES // (FLOAT32 * vocabulary))


def head(layers: Layers, block: Block, x: Tensor, positions: int) -> Scored:
    """The loss of `positions` labelled tokens."""
    if layers.architecture.final_norm:
        x = layers.norm(x, layers.final)
    if layers.architecture.task:
        return _of_task(layers, layers.architecture.task, x)
    states = layers.tape.op([x], positions * layers.architecture.hidden, x.size)
    if not layers.passes.scores_labels:
        return _whole(layers, block, states, positions)
    by_rows = block.table is not None and block.layers.setting.trained_tokens > 0 and layers.architecture.tied
    again = by_rows or layers.setting.compares_answers
    return _recomputed(layers, block, states) if again else _closed_form(layers, block, states)


def _of_task(layers: Layers, task: TaskHead, states: Tensor) -> Scored:
    """Scores of every token by a small layer that is trained, and what is made of them in float32."""
    tape = layers.tape
    read = layers.dropout(states) if task.dropout else states
    read = tape.cast(read, layers.compute) if layers.autocast else read
    tokens = states.numbers // layers.architecture.hidden
    weight = layers.weight(task.outputs * layers.architecture.hidden, FLOAT32)
    biases = [layers.weight(task.outputs, FLOAT32)] if task.bias else []
    saves = [read, weight] if read.needs_grad else [read]
    scores = tape.op([read, weight, *biases], tokens * task.outputs, read.size, saves=saves)
    making = scores.bytes if task.pooled else 0
    if task.pooled:
        scores = tape.op([scores], layers.rows * task.outputs, read.size)
    precise = tape.cast(scores, FLOAT32)
    chances = tape.like(precise, saves_output=True)
    loss = tape.op([chances], tokens, FLOAT32, saves=[chances])
    return Scored(loss, chances.bytes, making)


def _whole(layers: Layers, block: Block, states: Tensor, positions: int) -> Scored:
    """All logits, their float32 copy and its log-softmax."""
    architecture, tape = layers.architecture, layers.tape
    logits = _logits(layers, block, states)
    if architecture.scaled_logits:
        logits = tape.like(logits)
    if architecture.capped_logits:
        logits = tape.like(tape.like(tape.like(logits), saves_output=True))
    precise = tape.cast(logits, FLOAT32)
    chances = tape.like(precise, saves_output=True)
    loss = tape.op([chances], positions, FLOAT32, saves=[chances])
    held = logits.bytes + (precise.bytes if precise is not logits else 0)
    return Scored(loss, chances.bytes, held)


def _closed_form(layers: Layers, block: Block, states: Tensor) -> Scored:
    """Gradients come with the loss, chunk by chunk; the backward pass multiplies them by the gradient of the loss."""
    architecture, tape, what = layers.architecture, layers.tape, layers.trained
    weights = _head_weights(layers, block)
    biased = what.head_bias and block.family.head_bias
    biases = [tape.weight(architecture.vocabulary, layers.own)] if biased else []
    inputs = [states, *weights, *biases]
    # A weight's gradient is summed over chunks in no less than 32 bits.
    sizes = [states.size, *(max(each.size, FLOAT32) for each in (*weights, *biases))]
    saved = [tape.fresh(each.numbers, size) for each, size in zip(inputs, sizes, strict=True) if each.needs_grad]
    loss = tape.op(inputs, 1, FLOAT32, saves=saved)
    return Scored(loss, sum(each.bytes for each in saved), states.bytes + _chunk(layers, states, weights))


def _chunk(layers: Layers, states: Tensor, weights: list[Tensor]) -> int:
    """Bytes at the widest moment of a chunk: while it is scored, or while its slope is applied to states and weight."""
    architecture = layers.architecture
    rows, most = states.numbers // architecture.hidden, chunk_rows(architecture.vocabulary)
    size = layers.compute if layers.autocast else states.size
    logits = min(rows, most) * architecture.vocabulary
    raw, copied = logits * size, size < FLOAT32
    precise = logits * FLOAT32 if copied else 0  # float32 logits are turned into their slope where they are
    bent = logits * FLOAT32 if architecture.capped_logits else 0
    scoring = raw + precise + max(bent, raw if copied else 0)
    numbers = architecture.vocabulary * architecture.hidden
    held = max([layers.plain, *(each.size for each in weights)])
    cast = numbers * size if size < held else 0
    gradients = sum(numbers * (size + (each.size if each.size != size else 0)) for each in weights)
    return max(scoring, raw * (1 + copied) + cast + gradients)


def _recomputed(layers: Layers, block: Block, states: Tensor) -> Scored:
    """Every chunk is checkpointed, and its logits are computed once more: the head is more than a product, or what is
    made of its likelihoods is known only at the end."""
    architecture, tape = layers.architecture, layers.tape
    weights = _head_weights(layers, block)
    rows = states.numbers // architecture.hidden
    logits = min(rows, chunk_rows(architecture.vocabulary)) * architecture.vocabulary
    making = 3 * FLOAT32 * logits
    loss = tape.op([states, *weights], 1, FLOAT32, saves=[states], temporary=making)
    return Scored(loss, 0, making + sum(each.bytes for each in weights))  # gradients of two chunks are summed


def _head_weights(layers: Layers, block: Block) -> list[Tensor]:
    """What the head multiplies by, where it is trained."""
    if layers.trained.head:
        return [layers.tape.weight(layers.architecture.vocabulary * layers.architecture.hidden, layers.own)]
    return [block.head_table()] if block.table is not None and layers.architecture.tied else []


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
