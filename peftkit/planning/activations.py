"""What a training step keeps and needs besides weights: a decoder written on a tape and walked back."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import lru_cache

from peftkit.planning.architecture import Architecture
from peftkit.planning.layers import FLOAT32, SIZES, Layers
from peftkit.planning.setting import Setting
from peftkit.planning.tape import Backward, Tape, Tensor, Trace


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

    Blocks are alike, so three of them are walked and the rest follow by proportion.
    """
    # Only what matters, so that settings that differ elsewhere share one answer.
    plain = replace(setting, optim="sgd", rows_per_step=1, activation_offloading=False, double_quant=True)
    plain = replace(plain, evaluation_batch=1, evaluation_longest=1, max_new_tokens=1)
    masked = masked or architecture.family.always_masked
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
    two, three = _trace(case, 2), _trace(case, 3)
    kept, head, block, bottom = (
        _at(case.architecture.layers, two, three, name) for name in ("kept", "head", "block", "bottom")
    )
    # The log-softmax is kept too, but belongs to the logits.
    blocks = kept - FLOAT32 * labelled_positions(case.setting) * case.architecture.vocabulary
    return Activations(blocks, head - blocks, max(0, block - blocks), max(head, block, bottom))


def labelled_positions(setting: Setting) -> int:
    """Positions that the head is computed for in one micro-batch."""
    return setting.micro_batch * min(setting.labelled, setting.longest)


def _at(layers: int, two: Trace, three: Trace, name: str) -> int:
    low, high = getattr(two, name), getattr(three, name)
    return int(low + (high - low) * (layers - 2))


def _trace(case: _Case, blocks: int) -> Trace:
    """Walk a model of so many blocks."""
    setting, tape = case.setting, Tape()
    layers = Layers(tape, case.architecture, setting, setting.micro_batch, setting.longest)
    block = Block(layers, case.masked)
    x = block.embed()
    batch = tape.fresh(3 * layers.tokens, 8)  # ids, mask and labels
    tables = tape.fresh(2 * setting.longest * case.architecture.head_dim if block.family.rotary else 0, x.size)
    tape.keep(batch, tables, tape.fresh(setting.micro_batch * setting.longest**2, layers.mask_size(case.masked)))
    for _ in range(blocks):
        tape.begin(setting.gradient_checkpointing, x)
        x = block(x)
    tape.begin(False, x)
    loss, held = _head(layers, block, x)
    return Backward(tape, gradients_are_there=case.accumulating).walk(loss, held + _casts(case))


def _casts(case: _Case) -> int:
    """16-bit copies of float32 trained weights: autocast keeps them to the end of the forward pass.

    Without checkpointing the backward pass keeps them, and they are on the tape.
    """
    setting, architecture = case.setting, case.architecture
    if SIZES[setting.compute_dtype] == FLOAT32 or not setting.gradient_checkpointing:
        return 0
    if setting.method != "full":
        return SIZES[setting.compute_dtype] * architecture.adapter_parameters(setting.r, setting.target_modules)
    return SIZES[setting.compute_dtype] * architecture.linear_parameters if setting.dtype == "float32" else 0


def _head(layers: Layers, block: Block, x: Tensor) -> tuple[Tensor, int]:
    """The loss, and the bytes that only variables hold when it is computed."""
    architecture, setting, tape = layers.architecture, layers.setting, layers.tape
    x = layers.norm(x, architecture.hidden)
    positions = labelled_positions(setting)
    wanted = tape.op([x], positions * architecture.hidden, x.size)
    read = tape.cast(wanted, layers.compute) if layers.autocast else wanted
    count = positions * architecture.vocabulary
    if layers.full:
        weight = tape.weight(architecture.vocabulary * architecture.hidden, layers.plain)
        matrix = block.table if architecture.tied and block.table is not None else weight
        matrix = tape.cast(matrix, layers.compute) if layers.autocast else matrix
        logits = tape.op([read, matrix], count, read.size, saves=[read, matrix])
    else:
        # Autocast makes a 16-bit copy of a float32 head.
        cast = architecture.vocabulary * architecture.hidden * layers.compute if read.size < layers.plain else 0
        logits = tape.op([read], count, read.size, saves=[tape.fresh(cast, 1)])
    if architecture.scaled_logits:
        logits = tape.like(logits)
    if architecture.capped_logits:
        logits = tape.like(tape.like(tape.like(logits), saves_output=True))
    precise = tape.cast(logits, FLOAT32)
    chances = tape.like(precise, saves_output=True)
    loss = tape.op([chances], positions, FLOAT32, saves=[chances])
    held = logits.bytes + (precise.bytes if precise is not logits else 0)
    return loss, held


class Block:
    """One decoder block."""

    def __init__(self, layers: Layers, masked: bool) -> None:
        self.layers = layers
        self.masked = masked
        self.architecture = layers.architecture
        self.family = layers.architecture.family
        self.tape = layers.tape
        self.table: Tensor | None = None
        self.named = {linear.name: linear for linear in self.architecture.linears}

    def embed(self) -> Tensor:
        """The embedded tokens; checkpointing asks for a gradient at them, and so they stay as long as the graph."""
        layers, tape, positions = self.layers, self.tape, self.architecture.position_parameters
        numbers = layers.tokens * self.architecture.hidden
        if layers.full:
            count = self.architecture.vocabulary * self.architecture.hidden
            self.table = tape.weight(count, layers.plain, uses=2 if self.architecture.tied else 1)
            embedded = tape.op([self.table], numbers, layers.plain)
        else:
            embedded = tape.fresh(numbers, layers.plain, layers.setting.gradient_checkpointing)
            if embedded.needs_grad:
                tape.keep(embedded)
        if positions:
            table = [tape.weight(positions, layers.plain)] if layers.full else []
            rows = tape.op(table, layers.length * self.architecture.hidden, layers.plain)
            return tape.op([embedded, rows], numbers, layers.plain, passes_on=True)
        return tape.like(embedded) if self.family.scaled_embedding else embedded

    def __call__(self, x: Tensor) -> Tensor:
        """The block's result for x."""
        if self.architecture.parallel:
            return self._parallel(x)
        middle = self._residual(x, self._attention(self._before(x)))
        return self._residual(middle, self._feed_forward(self._before(middle)))

    def _before(self, x: Tensor) -> Tensor:
        """A norm before the layer, unless the family has norms behind it only."""
        only_behind = self.family.post_norms and self.family.norms == 2
        return x if only_behind else self.layers.norm(x, self.architecture.hidden)

    def _residual(self, x: Tensor, update: Tensor) -> Tensor:
        if self.family.post_norms:
            update = self.layers.norm(update, self.architecture.hidden)
        if self.family.scaled_residual:
            update = self.tape.like(update)
        return self.tape.add(x, update)

    def _parallel(self, x: Tensor) -> Tensor:
        layers, hidden = self.layers, self.architecture.hidden
        first = layers.norm(x, hidden)
        second = layers.norm(x, hidden) if self.architecture.second_norm else first
        return self.tape.add(self.tape.add(self._attention(first), self._feed_forward(second)), x)

    def _linear(self, x: Tensor, path: str, name: str) -> Tensor:
        return self.layers.linear(x, self.named[f"{path}.{name}" if path else name])

    def _attention(self, x: Tensor) -> Tensor:
        family, architecture, layers = self.family, self.architecture, self.layers
        if len(family.qkv) == 1:
            fused = self._linear(x, family.attention, family.qkv[0])
            query, key, value = self.tape.split(fused, architecture.queries, architecture.keys, architecture.keys)
        else:
            query, key, value = (self._linear(x, family.attention, name) for name in family.qkv)
        if architecture.qk_norm:
            full = family.qk_norm == "full"
            query = layers.norm(query, architecture.queries if full else architecture.head_dim)
            key = layers.norm(key, architecture.keys if full else architecture.head_dim)
        if family.rotary:
            query, key = layers.rotary(query), layers.rotary(key)
        result = layers.attention(query, key, value, self.masked)
        if family.partial_rotary:  # the kernel follows its queries' order of dimensions; the projection needs another
            result = self.tape.copy(result)
        return self._linear(result, family.attention, family.output)

    def _feed_forward(self, x: Tensor) -> Tensor:
        experts = self.architecture.experts
        if experts is not None and experts.layers:
            return self._experts(x)
        family = self.family
        return self._mlp(x, family.mlp)

    def _mlp(self, x: Tensor, path: str) -> Tensor:
        family, layers = self.family, self.layers
        if not family.gated:
            inner = layers.activation(self._linear(x, path, family.gate[0]))
            return self._linear(inner, path, family.down)
        if len(family.gate) == 1:
            gate, up = self.tape.split(self._linear(x, path, family.gate[0]), 1, 1)
        else:
            gate, up = (self._linear(x, path, name) for name in family.gate)
        return self._linear(self._gated(gate, up), path, family.down)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        active = self.layers.activation(gate)
        return self.tape.like(active, up, saves=[active, up])

    def _experts(self, x: Tensor) -> Tensor:
        """Every token goes through some experts; the stacked weights are products like those of a linear layer."""
        experts, layers, tape = self.architecture.experts, self.layers, self.tape
        assert experts is not None
        rows = layers.tokens * experts.per_token
        hidden, inner = self.architecture.hidden, experts.intermediate
        sent = tape.op([x], rows * hidden, x.size)
        both = self._stacked(sent, rows * 2 * inner, 2 * inner * hidden)
        gate, up = tape.split(both, 1, 1)
        back = self._stacked(self._gated(gate, up), rows * hidden, inner * hidden)
        weighted = tape.like(back, saves=[tape.fresh(rows, FLOAT32)])
        total = tape.op([weighted], layers.tokens * hidden, x.size)
        return tape.add(total, self._mlp(x, "mlp.shared_expert")) if experts.shared else total

    def _stacked(self, x: Tensor, numbers: int, weights: int) -> Tensor:
        layers, tape = self.layers, self.tape
        if not layers.full:
            return tape.op([x], numbers, x.size)
        experts = self.architecture.experts
        weight = tape.weight(weights * (experts.count if experts else 1), layers.plain)
        return tape.op([x, weight], numbers, x.size, saves=[x])
