"""What autograd keeps alive, counted on symbolic tensors: a forward pass is written down, a backward pass is walked.

Rules (torch 2.13, `autograd/engine.cpp`): nodes run in the reverse of the order they were made in; a node's saved
tensors are released when it has run; a gradient that meets another is added in new memory (`input_buffer.cpp` adds in
place only where the first one shares its storage with no view, and what linear layers and reshapes send are views).
"""

from __future__ import annotations

from collections import Counter
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
    """Bytes that the backward kernel needs besides its results."""
    siblings: tuple[Tensor, ...] = ()
    """Further outputs."""


@dataclass
class Segment:
    """Nodes that are checkpointed together, or not at all."""

    checkpointed: bool
    entry: Storage | None = None
    """What a checkpoint keeps: the input."""
    nodes: list[Node] = field(default_factory=list)


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
    ) -> Tensor:
        """An operation with a new result."""
        wanted = [tensor for tensor in inputs if tensor.needs_grad]
        output = Tensor(Storage(numbers * size), numbers, size, bool(wanted))
        if wanted:
            saved = [tensor.storage for tensor in saves] + ([output.storage] if saves_output else [])
            held = [tensor.storage for tensor in holds]
            self.segments[-1].nodes.append(Node(wanted, output, saved, held, passes_on, temporary))
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
        self.segments[-1].nodes.append(Node([x], parts[0], [], [], False, 0, tuple(parts[1:])))
        return parts

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """A sum of two tensors of one shape, in the wider dtype."""
        same = left.size == right.size
        return self.op([left, right], left.numbers, max(left.size, right.size), passes_on=same)


@dataclass
class Trace:
    """Bytes over a forward and a backward pass."""

    kept: int
    """At the end of the forward pass."""
    head: int
    """Peak in the head: at the end of the forward pass, or at the start of the backward pass."""
    block: int
    """Peak in the last block."""
    bottom: int
    """Peak in the first block and the embedding."""


class _Live:
    """Reference counts of storages, and the bytes of those that are alive."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.now = 0
        self.peak = 0

    def take(self, storage: Storage) -> None:
        self.counts[id(storage)] += 1
        if self.counts[id(storage)] == 1:
            self.now += storage.bytes
            self.peak = max(self.peak, self.now)

    def drop(self, storage: Storage) -> None:
        self.counts[id(storage)] -= 1
        if self.counts[id(storage)] == 0:
            self.now -= storage.bytes

    def touch(self, extra: int) -> None:
        self.peak = max(self.peak, self.now + extra)

    def forward(self, nodes: Sequence[Node], *, saving: bool) -> None:
        """Run a forward pass: a result lives as long as it is saved, or an operation still reads it."""
        last = {id(tensor.storage): node for node in nodes for tensor in node.inputs}
        made: set[int] = set()
        done: list[Storage] = []
        for node in nodes:
            output = node.output.storage
            if id(output) in last and id(output) not in made:
                made.add(id(output))
                self.take(output)
            for storage in node.saved if saving else ():
                self.take(storage)
            self.touch(node.temporary)
            ended = done
            read = {id(tensor.storage): tensor.storage for tensor in node.inputs}
            done = [storage for key, storage in read.items() if last[key] is node and key in made]
            if not saving:
                ended, done = done, []
            for storage in ended:  # what is saved is let go a little later: the caller's variable held it
                self.drop(storage)
        for storage in done:
            self.drop(storage)


def forward_peak(tape: Tape) -> int:
    """Most bytes that the last segment's results take while it runs and nothing is saved."""
    live = _Live()
    live.forward(tape.segments[-1].nodes, saving=False)
    return live.peak


class Backward:
    """The backward pass of a tape whose last segment is the head, and whose first is the embedding."""

    def __init__(self, tape: Tape, *, gradients_are_there: bool) -> None:
        """With `gradients_are_there` an earlier micro-batch left weight gradients, and new ones are added to them."""
        self.tape = tape
        self.gradients_are_there = gradients_are_there
        self.live = _Live()
        self.grads: dict[int, Storage] = {}
        self.sent: Counter[int] = Counter()
        self.firsts: dict[int, Storage] = {}

    def walk(self, loss: Tensor, held: int) -> Trace:
        """Run from `loss`; `held` are bytes that only variables hold at the end of the forward pass.

        There are at least two blocks: segments are the embedding, the blocks, the head.
        """
        live, segments = self.live, self.tape.segments
        for storage in self.tape.kept:
            live.take(storage)
        for segment in segments:
            self._keep(segment)
        kept = live.now
        live.touch(held)
        self.grads[id(loss)] = Storage(loss.bytes)
        live.take(self.grads[id(loss)])
        peaks = {}
        for index in range(len(segments) - 1, -1, -1):
            self._segment(segments[index])
            if index in (len(segments) - 1, len(segments) - 2, 2, 0):
                peaks[index], live.peak = live.peak, live.now
        return Trace(kept, peaks[len(segments) - 1], peaks[len(segments) - 2], peaks[0])

    def _keep(self, segment: Segment) -> None:
        if segment.checkpointed and segment.entry is not None:
            self.live.take(segment.entry)
        for node in segment.nodes:
            if segment.checkpointed:  # what is computed again are other tensors than those on ctx
                node.held = [self._first(storage) for storage in node.held]
            for storage in node.held if segment.checkpointed else node.saved + node.held:
                self.live.take(storage)

    def _first(self, storage: Storage) -> Storage:
        """The storage that the first forward pass made where a checkpoint makes another."""
        return self.firsts.setdefault(id(storage), Storage(storage.bytes))

    def _segment(self, segment: Segment) -> None:
        if segment.checkpointed:
            self.live.forward(segment.nodes, saving=True)
        for node in reversed(segment.nodes):
            self._run(node)
        if segment.checkpointed and segment.entry is not None:
            self.live.drop(segment.entry)

    def _run(self, node: Node) -> None:
        outputs = (node.output, *node.siblings)
        arrived = [self.grads.pop(id(output)) for output in outputs if id(output) in self.grads]
        made: list[tuple[Tensor, Storage]] = []
        if arrived:
            for tensor in node.inputs:
                storage = arrived[0] if node.passes_on else Storage(tensor.bytes)
                self.live.take(storage)
                made.append((tensor, storage))
            self.live.touch(node.temporary)
            for incoming in arrived:
                self.live.drop(incoming)
        for storage in node.saved:  # what is held on ctx goes with the graph, when the loss is forgotten
            self.live.drop(storage)
        for tensor, storage in made:
            self._accumulate(tensor, storage)

    def _accumulate(self, tensor: Tensor, storage: Storage) -> None:
        key = id(tensor)
        before = self.grads.get(key)
        self.grads[key] = storage if before is None else self._sum(before, storage)
        if tensor.uses:
            self.sent[key] += 1
            if self.sent[key] == tensor.uses and self.gradients_are_there:
                self.live.drop(self.grads.pop(key))

    def _sum(self, first: Storage, second: Storage) -> Storage:
        """A linear layer's gradients are views of another tensor, which take no sum: it needs memory of its own."""
        live, total = self.live, Storage(first.bytes)
        live.take(total)
        live.drop(first)
        live.drop(second)
        return total
