"""The operations of PEFT 0.21's adapted layers, method by method, as `layers` writes those of the base."""

from __future__ import annotations

from collections.abc import Callable

from peftkit.planning.architecture import Linear
from peftkit.planning.factors import block_size, kronecker, rank, scales_inputs
from peftkit.planning.layers import FLOAT32, Layers
from peftkit.planning.tape import Tensor


def linear(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """A linear layer with its adapter, where it has one."""
    if linear.name not in layers.here.adapted:
        return layers.linear(x, linear)
    return _METHODS.get(layers.setting.method, _lora)(layers, x, linear)


def _lora(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    if layers.passes.fused:
        return _fused(layers, x, linear)
    tape, r = layers.tape, rank(layers.setting)
    base = _cloned(layers, layers.linear(x, linear))
    read = _read(layers, x)
    low = layers.product(read, linear.into, r)
    update = layers.product(low, r, linear.out)
    if layers.setting.method == "dora":
        magnitude = tape.weight(linear.out, FLOAT32)  # scales the base's result and the adapter's
        # The norms of the whole weight: an identity that goes through the adapter, the delta weight, that scaled, the
        # sum; and the weight, where it is packed.
        matrices = linear.into * linear.into + (4 if layers.bits in (4, 8) else 3) * linear.out * linear.into
        saves, making = [base, update], matrices * FLOAT32
        update = tape.op([update, magnitude], update.numbers, update.size, saves=saves, making=making)
    else:
        update = tape.like(update)
    if _converts(layers) and layers.bits in (4, 8):
        update = tape.cast(update, base.size)
    return tape.cast(tape.add(base, update), base.size)


def _fused(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """`tuning.fused`: x and its product with A are saved, and the sum is written over the base's result."""
    tape, r = layers.tape, rank(layers.setting)
    base = _cloned(layers, layers.linear(x, linear))
    size = layers.compute if layers.autocast else FLOAT32
    read = tape.cast(x, size)
    factors = [tape.weight(r * linear.into, FLOAT32), tape.weight(r * linear.out, FLOAT32)]
    inner = tape.fresh(layers.tokens * r, size)
    # The gradient of what is added is that of the sum, so it takes no memory; B's share of it is of inner's size.
    added = tape.op([read, *factors], 0, size, saves=[read, inner], temporary=inner.bytes)
    added.numbers = base.numbers
    if base.size == size and not (linear.bias and layers.bits not in (4, 8)):
        return tape.add_into(base, added)
    return tape.op([base, added], base.numbers, base.size, passes_on=base.size == size)


def _adalora(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """(x @ (lora_A * lora_E).T @ lora_B.T) * scaling / ranknum, added in place (but for 8 bits)."""
    tape, r = layers.tape, layers.setting.r
    base = _cloned(layers, layers.linear(x, linear))
    read = _read(layers, x)
    into = tape.op(
        [tape.weight(r * linear.into, FLOAT32), tape.weight(r, FLOAT32)], r * linear.into, FLOAT32,
        temporary=r * linear.into * FLOAT32,
    )  # fmt: skip
    into = tape.cast(into, read.size)
    low = tape.op([read, into], layers.tokens * r, read.size, saves=[read, into] if read.needs_grad else [read])
    update = tape.like(layers.product(low, r, linear.out))
    update = tape.op([update], update.numbers, FLOAT32)  # the rank it is divided by is a float32 tensor
    return tape.add(base, update) if layers.bits == 8 else tape.add_into(base, tape.cast(update, base.size))


def _ia3(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """One factor for every input of the MLP's last layer, and for every output of the others."""
    tape, packed = layers.tape, layers.bits in (4, 8)
    read = tape.cast(x, FLOAT32) if packed and not layers.on_cuda else x
    if scales_inputs(layers.architecture, layers.setting, linear):
        scaled = _scaled(layers, tape.cast(read, FLOAT32), linear.into)
        result = layers.linear(scaled if packed else tape.cast(scaled, x.size), linear)
    else:  # over packed layers the result stays in float32
        base = layers.linear(read, linear)
        scaled = _scaled(layers, base, linear.out)
        result = scaled if packed else tape.cast(scaled, base.size)
    return _cloned(layers, result)


def _scaled(layers: Layers, x: Tensor, width: int) -> Tensor:
    """x times a trained vector, in float32."""
    tape, vector = layers.tape, layers.tape.weight(width, FLOAT32)
    saves = [x, vector] if x.needs_grad else [x]
    return tape.op([x, vector], x.numbers, FLOAT32, saves=saves, temporary=x.numbers * FLOAT32)


def _vera(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """lambda_b * (B @ (lambda_d * (A @ x))): A and B are drawn once for all layers, and never trained."""
    tape, r = layers.tape, layers.setting.r
    base = _cloned(layers, layers.linear(x, linear))
    read = tape.cast(x, FLOAT32)
    low = _frozen_product(layers, read, linear.into, r)
    high = _frozen_product(layers, _scaled(layers, low, r), r, linear.out)
    total = tape.add(base, _scaled(layers, high, linear.out), making=0 if read is x else read.bytes)
    return tape.cast(total, base.size)


def _frozen_product(layers: Layers, x: Tensor, into: int, out: int) -> Tensor:
    """Autocast copies a float32 matrix; what is not trained it does not keep for the next layer."""
    read = layers.tape.cast(x, layers.compute) if layers.autocast else x
    copied = layers.tape.fresh(into * out * layers.compute if layers.autocast else 0, 1)
    return layers.tape.op([read], read.numbers // into * out, read.size, saves=[copied])


def _loha(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """The whole delta weight is built: (w1_a @ w1_b) * (w2_a @ w2_b), by a function that saves the four factors."""
    r, size = layers.setting.r, layers.compute
    factors = [layers.tape.weight(r * width, FLOAT32) for width in (linear.out, linear.into) * 2]
    numbers = linear.out * linear.into
    return _with_delta(layers, x, linear, layers.tape.op(factors, numbers, size, temporary=4 * numbers * size))


def _lokr(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """The whole delta weight is built: the Kronecker product of a small factor and a large one, and scaled."""
    tape, numbers = layers.tape, linear.out * linear.into
    shapes = kronecker(layers.setting, linear)
    small = tape.weight(shapes.small[0] * shapes.small[1], FLOAT32)
    large_size = shapes.large[0] * shapes.large[1]
    if shapes.split:
        low, high = (tape.weight(layers.setting.r * width, FLOAT32) for width in shapes.large)
        large = tape.op([low, high], large_size, layers.compute, saves=[low, high])
    else:
        large = tape.weight(large_size, FLOAT32)
    wide = max(FLOAT32, large.size)
    rebuilt = tape.op([small, large], numbers, wide, saves=[small, large], temporary=numbers * wide)
    return _with_delta(layers, x, linear, tape.like(rebuilt))


def _with_delta(layers: Layers, x: Tensor, linear: Linear, delta: Tensor) -> Tensor:
    tape = layers.tape
    base = layers.linear(x, linear)
    read, delta = tape.cast(tape.cast(x, delta.size), layers.compute), tape.cast(delta, layers.compute)
    saves = [read, delta] if read.needs_grad else [read]
    update = tape.op([read, delta], layers.tokens * linear.out, read.size, saves=saves)
    return tape.cast(tape.add(base, update), base.size)


def _oft(layers: Layers, x: Tensor, linear: Linear) -> Tensor:
    """The input is turned block by block, by matrices whose series (four powers of a skew one) is kept."""
    tape = layers.tape
    size = block_size(linear.into, layers.setting.oft_block_size)
    numbers, matrix = linear.into // size * (size * (size - 1) // 2), linear.into * size
    vector = tape.weight(numbers, FLOAT32)
    skew = tape.op([vector], matrix, FLOAT32, temporary=2 * matrix * FLOAT32)
    second = tape.like(skew, saves=[skew])
    third = tape.like(second, skew, saves=[second, skew])
    fourth = tape.like(third, skew, saves=[third, skew])
    turn = tape.op([skew, second, third, fourth], matrix, FLOAT32, passes_on=True)
    read = tape.cast(x, FLOAT32)
    blocks = tape.cast(tape.view(read, read.numbers), layers.compute)
    turn = tape.cast(turn, layers.compute)
    saves = [blocks, turn] if blocks.needs_grad else [blocks]
    # The product comes block by block, and is copied into x's order.
    making = x.numbers * layers.compute + (0 if read is x else read.bytes)
    turned = tape.op([blocks, turn], x.numbers, layers.compute, saves=saves, making=making)
    return layers.linear(tape.cast(turned, x.size), linear)


def _converts(layers: Layers) -> bool:
    """Adapters of quantized layers cast to float32 unless CUDA's autocast is on; those of plain layers always do."""
    return layers.bits not in (4, 8) or not (layers.autocast and layers.on_cuda)


def _read(layers: Layers, x: Tensor) -> Tensor:
    """The adapter's input: dropped, and as products read it."""
    read = layers.tape.cast(x, FLOAT32) if _converts(layers) else x
    if layers.setting.lora_dropout > 0:
        read = layers.dropout(read)
    return layers.tape.cast(read, layers.compute) if layers.autocast else read


def _cloned(layers: Layers, base: Tensor) -> Tensor:
    """PEFT clones what 4-bit layers return."""
    return layers.tape.copy(base) if layers.bits == 4 else base


_METHODS: dict[str, Callable[[Layers, Tensor, Linear], Tensor]] = {
    "adalora": _adalora,
    "ia3": _ia3,
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
}
