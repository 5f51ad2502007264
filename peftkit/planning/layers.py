"""The operations of a decoder's layers, written on a tape as transformers 5.23 and PEFT 0.21 run them.

What an operation saves is read off torch's derivatives.yaml: a product saves each factor whose partner needs a
gradient, a sum saves nothing, a linear layer saves its input only for a trained weight and its weight only for the
input's gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peftkit.planning.architecture import Architecture, Linear
from peftkit.planning.norms import Norm
from peftkit.planning.passes import Passes
from peftkit.planning.setting import Setting
from peftkit.planning.tape import Tape, Tensor
from peftkit.planning.trained import Touched, in_blocks, trained

FLOAT32 = 4
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


@dataclass
class Layers:
    """Layers of one model on a tape, for `tokens` in rows of `length`; the last row may be shorter."""

    tape: Tape
    architecture: Architecture
    setting: Setting
    tokens: int
    length: int
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        setting = self.setting
        self.prefix = setting.num_virtual_tokens if setting.method == "prefix_tuning" else 0
        """Keys and values of virtual tokens before those of every layer."""
        self.words = self.tokens
        """Tokens that the embedding is read for."""
        self.rows = math.ceil(self.tokens / self.length)
        if setting.method == "prompt_tuning":
            self.length += setting.num_virtual_tokens
            self.tokens += self.rows * setting.num_virtual_tokens
        self.positions = self.tokens if self.passes.flat else self.length
        """Positions that tables are made for: those of rows side by side are the same."""
        self.compute = SIZES[setting.compute_dtype]
        self.autocast = self.compute < FLOAT32
        self.plain = SIZES[setting.dtype]
        self.trained = trained(self.architecture, setting)
        hidden, family = self.architecture.hidden, self.architecture.family
        self.final = Norm(family.names.norm, hidden, hidden, family.norm_weights)
        """The norm behind the blocks."""
        self.own = self.plain if setting.in_place else FLOAT32
        """Bytes of a trained number of the base."""
        self.at(0)
        self.on_cuda = setting.device == "cuda"
        self.bits = setting.bits if self.architecture.family.quantizable else 16

    def at(self, block: int) -> None:
        """What comes next belongs to this block, or stands behind them all."""
        blocks, what = self.trained.blocks, self.trained
        final, none = frozenset({self.final.name}), frozenset[str]()
        behind = Touched(norms=final if what.norm else none, norm_biases=final if what.norm_bias else none)
        self.here = blocks[block] if block < len(blocks) else behind

    @property
    def eager(self) -> bool:
        """Whether every score of attention is written out."""
        return self.setting.attention == "eager" or self.architecture.softcapped

    @property
    def seen(self) -> int:
        """Pairs of tokens in attention."""
        return self.tokens * (self.length + self.prefix)

    def mask_size(self, masked: bool) -> int:
        """Bytes per entry of the mask that all layers share: numbers for eager attention, or booleans."""
        return FLOAT32 if self.eager else int(masked)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """A linear layer as it is held: trained, plain or quantized."""
        outside = self.trained.outside and not in_blocks(self.architecture, linear)
        if linear.name in self.here.weights or outside:
            return self._trained_linear(x, linear)
        return self._frozen(x, linear)

    def weight(self, numbers: int, size: int) -> Tensor:
        """A trained weight as a product reads it: under autocast a 16-bit copy of a float32 one."""
        weight = self.tape.weight(numbers, size)
        return self.tape.cast(weight, self.compute) if self.autocast and size == FLOAT32 else weight

    def _trained_linear(self, x: Tensor, linear: Linear) -> Tensor:
        read = self.tape.cast(x, self.compute) if self.autocast else x
        weight = self.weight(linear.out * linear.into, self.own)
        inputs = [read, weight] + ([self.weight(linear.out, self.own)] if linear.bias else [])
        saves = [read, weight] if read.needs_grad else [read]
        return self.tape.op(inputs, self.tokens * linear.out, read.size, saves=saves)

    def _frozen(self, x: Tensor, linear: Linear) -> Tensor:
        read = self.tape.cast(x, self.compute) if self.autocast or self.bits == 4 else x
        scratch = linear.out * linear.into * read.size if self.bits in (4, 8) else 0
        holds = [read] if self.bits == 8 else []  # MatMul8bitFp keeps its input on ctx
        bias = [self.weight(linear.out, self.own)] if linear.name in self.here.biases else []
        base = self.tape.op([read, *bias], self.tokens * linear.out, read.size, holds=holds, temporary=scratch)
        return self.tape.cast(base, x.size) if self.bits == 4 else base  # Linear4bit returns the dtype it was given

    def product(self, x: Tensor, into: int, out: int) -> Tensor:
        """x times a trained float32 matrix."""
        weight = self.weight(into * out, FLOAT32)
        saves = [x, weight] if x.needs_grad else [x]
        return self.tape.op([x, weight], x.numbers // into * out, x.size, saves=saves)

    def dropout(self, x: Tensor) -> Tensor:
        """A mask is saved: bytes on CUDA, numbers of x's dtype on a CPU."""
        return self.tape.like(x, saves=[self.tape.fresh(x.numbers, 1 if self.on_cuda else x.size)])

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """RMSNorm in float32, or torch's LayerNorm."""
        return self._rms(x, norm) if self.architecture.family.norm == "rms" else self._layer_norm(x, norm)

    def _rms(self, x: Tensor, norm: Norm) -> Tensor:
        tape = self.tape
        precise = tape.cast(x, FLOAT32)
        square = tape.like(precise, saves=[precise])
        mean = tape.op([square], x.numbers // norm.width, FLOAT32)
        scale = tape.like(mean, saves_output=True)
        normed = tape.cast(tape.like(precise, scale, saves=[precise, scale]), x.size)
        if norm.name not in self.here.norms:
            return tape.op([normed], normed.numbers, max(normed.size, self.plain))
        weight = tape.weight(norm.entries, self.own)
        saves = [normed, weight] if normed.needs_grad else [normed]
        return tape.op([normed, weight], normed.numbers, max(normed.size, self.own), saves=saves)

    def _layer_norm(self, x: Tensor, norm: Norm) -> Tensor:
        # CUDA's autocast runs layer_norm in float32, a CPU's in the dtype it gets.
        read = self.tape.cast(x, FLOAT32) if self.autocast and self.on_cuda else x
        statistics = self.tape.fresh(2 * x.numbers // norm.width, FLOAT32)
        here, vectors = self.here, norm.vectors
        count = (norm.name in here.norms and vectors >= 1) + (norm.name in here.norm_biases and vectors == 2)
        weights = [self.tape.weight(count * norm.entries, self.own)] if count else []
        return self.tape.like(read, *weights, saves=[read, statistics])

    def activation(self, x: Tensor) -> Tensor:
        """Fused activations save their input, relu its result; gelu_new is written out in Python and saves four."""
        if self.architecture.activation == "relu":
            return self.tape.like(x, saves_output=True)
        return self._gelu_new(x) if self.architecture.activation == "gelu_new" else self.tape.like(x, saves=[x])

    def _gelu_new(self, x: Tensor) -> Tensor:
        """0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3))); CUDA's autocast raises to powers in float32."""
        tape = self.tape
        half = tape.like(x)
        read = tape.cast(x, FLOAT32) if self.autocast and self.on_cuda else x
        cube = tape.like(tape.like(read, saves=[read]))
        tanh = tape.like(tape.like(tape.add(x, cube)), saves_output=True)
        one = tape.copy(tanh)
        return tape.op([half, one], x.numbers, one.size, saves=[half, one])

    def rotary(self, x: Tensor) -> Tensor:
        """x * cos + rotate_half(x) * sin; the tables are shared by all layers and counted once."""
        tape, size = self.tape, max(x.size, self.plain)
        left = tape.op([x], x.numbers, size)
        second = tape.like(tape.view(x, x.numbers // 2))
        turned = tape.op([second, tape.view(x, x.numbers // 2)], x.numbers, x.size, passes_on=True)
        return tape.add(left, tape.op([turned], x.numbers, size))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, masked: bool) -> Tensor:
        """Scaled dot products; fused kernels save queries, keys, values, their result and one logarithm per row."""
        tape, heads = self.tape, self.architecture.heads
        if self.prefix:
            key, value = (self._prefixed(x) for x in (key, value))
        if self.autocast:
            query, key, value = (tape.cast(x, self.compute) for x in (query, key, value))
        if self.architecture.broadcasts and not self.eager:
            return self._written_out(query)
        if masked or self.eager:  # only kernels without a mask read one key head for several query heads
            key, value = (self._per_query_head(x) for x in (key, value))
        if self.eager:
            return self._eager(query, key, value)
        saves = [query, key, value, tape.fresh(self.tokens * heads, FLOAT32)]
        if masked:  # every layer makes a mask of numbers from the one of booleans
            saves.append(tape.fresh(self.seen, query.size))
        # FlashAttention's backward sums the gradient of the queries in float32.
        scratch = query.numbers * FLOAT32 if self.on_cuda else 0
        by_row = self.passes.flat and self.rows > 1 and self.setting.attention == "sdpa"
        if by_row:  # the rows' gradients of the queries are put together
            scratch += query.bytes
        inputs = [query, key, value]
        result = tape.op(inputs, query.numbers, query.size, saves=saves, saves_output=True, temporary=scratch)
        return tape.copy(result) if by_row else result  # the rows' results are put together

    def _prefixed(self, x: Tensor) -> Tensor:
        """The trained keys or values of the virtual tokens, and those of the row."""
        virtual = self.rows * self.prefix * self.architecture.keys
        first = self.tape.op([self.tape.weight(virtual // self.rows, FLOAT32)], virtual, x.size)
        return self.tape.op([first, x], first.numbers + x.numbers, x.size)

    def _per_query_head(self, x: Tensor) -> Tensor:
        numbers = (self.tokens + self.rows * self.prefix) * self.architecture.queries
        return x if x.numbers == numbers else self.tape.op([x], numbers, x.size)

    def _written_out(self, query: Tensor) -> Tensor:
        """Torch's own products and softmax, where no fused kernel fits: scaled copies and the shares are saved."""
        tape = self.tape
        count = self.architecture.heads * self.seen
        query, key, value = (tape.like(query) for _ in range(3))
        shares = tape.like(tape.op([query, key], count, query.size, saves=[query, key]), saves_output=True)
        return tape.op([shares, value], query.numbers, query.size, saves=[shares, value])

    def _eager(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tape = self.tape
        count = self.architecture.heads * self.seen
        scores = tape.like(tape.op([query, key], count, query.size, saves=[query, key]))
        if self.architecture.softcapped:
            scores = tape.like(tape.like(tape.like(scores), saves_output=True))
        soft = tape.op([tape.copy(scores)], count, FLOAT32, saves_output=True)
        shares = tape.cast(soft, query.size)
        return tape.op([shares, value], query.numbers, query.size, saves=[shares, value])
