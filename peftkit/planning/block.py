"""One decoder block on a tape, and the embedding before the blocks."""

from __future__ import annotations

from peftkit.planning import adapters
from peftkit.planning.architecture import Architecture
from peftkit.planning.backward import forward_peak
from peftkit.planning.layers import FLOAT32, Layers
from peftkit.planning.norms import Norm, block_norms
from peftkit.planning.passes import Passes
from peftkit.planning.setting import Setting
from peftkit.planning.tape import Tape, Tensor


def forward_pass(
    architecture: Architecture,
    setting: Setting,
    tokens: int,
    length: int,
    index: int,
    *,
    masked: bool = False,
    passes: Passes | None = None,
) -> int:
    """The widest moment of a block's forward pass of which nothing is saved, and what lives through it."""
    tape = Tape()
    layers = Layers(tape, architecture, setting, tokens, length, passes or Passes())
    layers.at(index)
    x = tape.fresh(layers.tokens * architecture.hidden, layers.plain, needs_grad=True)  # only such are written down
    tape.begin(False, x)
    Block(layers, masked)(x)
    tables = 2 * layers.tokens * architecture.head_dim * x.size if architecture.family.rotary else 0
    return forward_peak(tape) + 3 * x.bytes + tables  # held by frames: the embedded tokens, the inputs of block and MLP


class Block:
    """One decoder block."""

    def __init__(self, layers: Layers, masked: bool) -> None:
        self.layers = layers
        self.masked = masked
        self.architecture = layers.architecture
        self.family = layers.architecture.family
        self.tape = layers.tape
        self.table: Tensor | None = None
        self.rows: Tensor
        self.norms = block_norms(self.architecture)
        self.named = {linear.name: linear for linear in self.architecture.linears}

    def embed(self) -> Tensor:
        """The embedded tokens."""
        layers, tape, positions = self.layers, self.tape, self.architecture.position_parameters
        embedded, what = self._words(), layers.trained
        numbers = embedded.numbers
        if positions:
            table = [tape.weight(positions, layers.own)] if what.positions else []
            rows = tape.op(table, layers.positions * self.architecture.hidden, layers.own if table else layers.plain)
            return tape.op([embedded, rows], numbers, max(embedded.size, rows.size), passes_on=True)
        return tape.like(embedded) if self.family.scaled_embedding else embedded

    def _words(self) -> Tensor:
        layers, tape, setting = self.layers, self.tape, self.layers.setting
        hidden = self.architecture.hidden
        numbers, words = layers.words * hidden, self.architecture.vocabulary * hidden
        if layers.trained.embedding:
            self.table = tape.weight(words, layers.own, uses=2 if self.architecture.tied else 1)
            return tape.op([self.table], numbers, layers.own)
        if setting.trained_tokens:
            self.rows = tape.weight(setting.trained_tokens * hidden, FLOAT32, uses=2 if self.architecture.tied else 1)
            self.table = self._with_rows()
            return tape.op([self.table], numbers, layers.plain)
        embedded = tape.fresh(numbers, layers.plain)
        if setting.method != "prompt_tuning":
            return embedded
        virtual = setting.num_virtual_tokens * hidden
        prompts = tape.op([tape.weight(virtual, FLOAT32)], layers.rows * virtual, FLOAT32)
        return tape.op([tape.cast(prompts, layers.plain), embedded], layers.tokens * hidden, layers.plain)

    def _with_rows(self) -> Tensor:
        """The whole embedding once more, with the trained rows in it."""
        words = self.architecture.vocabulary * self.architecture.hidden
        return self.tape.op([self.rows], words, self.layers.plain)

    def head_table(self) -> Tensor:
        """What a tied head multiplies by."""
        assert self.table is not None
        return self._with_rows() if self.layers.setting.trained_tokens else self.table

    def __call__(self, x: Tensor) -> Tensor:
        """The block's result for x."""
        if self.architecture.parallel:
            return self._parallel(x)
        norms = self.norms
        middle = self._residual(x, self._attention(self._normed(x, norms.before_attention)), norms.behind_attention)
        return self._residual(middle, self._feed_forward(self._normed(middle, norms.before_mlp)), norms.behind_mlp)

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        return x if norm is None else self.layers.norm(x, norm)

    def _residual(self, x: Tensor, update: Tensor, norm: Norm | None) -> Tensor:
        update = self._normed(update, norm)
        if self.family.scaled_residual:
            update = self.tape.like(update)
        return self.tape.add(x, update)

    def _parallel(self, x: Tensor) -> Tensor:
        norms = self.norms
        first = self._normed(x, norms.before_attention)
        second = first if norms.before_mlp is None else self._normed(x, norms.before_mlp)
        return self.tape.add(self.tape.add(self._attention(first), self._feed_forward(second)), x)

    def _linear(self, x: Tensor, path: str, name: str) -> Tensor:
        return adapters.linear(self.layers, x, self.named[f"{path}.{name}" if path else name])

    def _attention(self, x: Tensor) -> Tensor:
        family, architecture, layers = self.family, self.architecture, self.layers
        if len(family.qkv) == 1:
            fused = self._linear(x, family.attention, family.qkv[0])
            query, key, value = self.tape.split(fused, architecture.queries, architecture.keys, architecture.keys)
        else:
            query, key, value = (self._linear(x, family.attention, name) for name in family.qkv)
        query, key = self._normed(query, self.norms.queries), self._normed(key, self.norms.keys)
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
        if not layers.here.experts:
            return tape.op([x], numbers, x.size)
        experts = self.architecture.experts
        weight = tape.weight(weights * (experts.count if experts else 1), layers.own)
        return tape.op([x, weight], numbers, x.size, saves=[x])
