"""A forward pass of symbolic tensors, written down operation by operation: what each one saves, holds and makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Storage:
    """Memory that tensors share; that of weights counts 0 here, since it is always there."""

    bytes: int


@dataclass(eq=False)
class Tensor:
    """A tensor without values: its storage, how many numbers of how many bytes, and whether it has a gradient."""

    storage: Storage
    numbers: int
    size: int
    needs_grad: bool = False
    uses: int = 0
    """Of a weight: how many operations read it. Its gradient stays when all of them have sent theirs."""

    @property
    def bytes(self) -> int:
        """Bytes of its numbers, and of its gradient."""
        return self.numbers * self.size


@dataclass(eq=False)
class Node:
    """One differentiable operation."""

    inputs: list[Tensor]
    output: Tensor
    saved: list[Storage]
    held: list[Storage]
    """Kept on `ctx`, where neither hooks nor checkpointing reach."""
    passes_on: bool
    """The gradient of every input is the output's, or a view of it."""
    temporary: int
    """Bytes that the kernels need besides their results, forward and backward."""
    making: int = 0
    """Bytes that the forward pass needs besides, and gives back."""
    siblings: tuple[Tensor, ...] = ()
    """Further outputs."""


@dataclass
class Segment:
    """Nodes that are checkpointed together, or not at all."""

    checkpointed: bool
    entry: Storage | None = None
    """What a checkpoint keeps: the input."""
    nodes: list[Node] = field(default_factory=list)

    @property
    def keeps_entry(self) -> bool:
        """A checkpoint without anything to save is forgotten, and so is what it would be computed again from."""
        return self.checkpointed and bool(self.nodes)


class Tape:
    """A forward pass, written down operation by operation."""

    def __init__(self) -> None:
        self.segments = [Segment(False)]
        self.kept: list[Storage] = []

    def begin(self, checkpointed: bool, entry: Tensor) -> None:
        """Start a segment that reads `entry`."""
        self.segments.append(Segment(checkpointed, entry.storage))

    def keep(self, *tensors: Tensor) -> None:
        """Tensors that live as long as the step."""
        self.kept += [tensor.storage for tensor in tensors]

    def fresh(self, numbers: int, size: int, needs_grad: bool = False) -> Tensor:
        """A tensor that no operation made."""
        return Tensor(Storage(numbers * size), numbers, size, needs_grad)

    def weight(self, numbers: int, size: int, uses: int = 1) -> Tensor:
        """A trained parameter; its own memory is counted with the weights."""
        return Tensor(Storage(0), numbers, size, needs_grad=True, uses=uses)

    def op(
        self,
        inputs: Sequence[Tensor],
        numbers: int,
        size: int,
        *,
        saves: Sequence[Tensor] = (),
        saves_output: bool = False,
        holds: Sequence[Tensor] = (),
        passes_on: bool = False,
        temporary: int = 0,
        making: int = 0,
    ) -> Tensor:
        """An operation with a new result."""
        wanted = [tensor for tensor in inputs if tensor.needs_grad]
        output = Tensor(Storage(numbers * size), numbers, size, bool(wanted))
        if wanted:
            saved = [tensor.storage for tensor in saves] + ([output.storage] if saves_output else [])
            held = [tensor.storage for tensor in holds]
            self.segments[-1].nodes.append(Node(wanted, output, saved, held, passes_on, temporary, making))
        return output

    def like(self, x: Tensor, *others: Tensor, saves: Sequence[Tensor] = (), saves_output: bool = False) -> Tensor:
        """An operation whose result has the shape and dtype of x."""
        return self.op([x, *others], x.numbers, x.size, saves=saves, saves_output=saves_output)

    def cast(self, x: Tensor, size: int) -> Tensor:
        """x in numbers of `size` bytes: a copy, or x itself."""
        return x if x.size == size else self.op([x], x.numbers, size)

    def copy(self, x: Tensor) -> Tensor:
        """A copy, or a sum with a constant: the gradient passes unchanged."""
        return self.op([x], x.numbers, x.size, passes_on=True)

    def view(self, x: Tensor, numbers: int) -> Tensor:
        """A slice of x; its gradient is written into zeros of the whole."""
        output = Tensor(x.storage, numbers, x.size, x.needs_grad)
        if x.needs_grad:
            self.segments[-1].nodes.append(Node([x], output, [], [], False, 0))
        return output

    def split(self, x: Tensor, *widths: int) -> list[Tensor]:
        """Views of x side by side, whose gradients are written into one tensor."""
        whole = sum(widths)
        if not x.needs_grad:
            return [Tensor(x.storage, x.numbers * width // whole, x.size) for width in widths]
        parts = [Tensor(x.storage, x.numbers * width // whole, x.size, True) for width in widths]
        self.segments[-1].nodes.append(Node([x], parts[0], [], [], False, 0, siblings=tuple(parts[1:])))
        return parts

    def add(self, left: Tensor, right: Tensor, making: int = 0) -> Tensor:
        """A sum of two tensors of one shape, in the wider dtype."""
        same = left.size == right.size
        return self.op([left, right], left.numbers, max(left.size, right.size), passes_on=same, making=making)

    def add_into(self, left: Tensor, right: Tensor) -> Tensor:
        """A sum of two tensors of one shape and dtype that is written over the first."""
        output = Tensor(left.storage, left.numbers, left.size, left.needs_grad or right.needs_grad)
        if wanted := [tensor for tensor in (left, right) if tensor.needs_grad]:
            self.segments[-1].nodes.append(Node(wanted, output, [], [], True, 0))
        return output
