"""What autograd keeps alive, counted on a tape that is walked back.

Rules (torch 2.13, `autograd/engine.cpp`): nodes run in the reverse of the order they were made in; a node's saved
tensors are released when it has run; a gradient that meets another is added in new memory (`input_buffer.cpp` adds in
place only where the first one shares its storage with no view, and what linear layers and reshapes send are views).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.planning.tape import Node, Segment, Storage, Tape, Tensor


@dataclass
class Trace:
    """Bytes over a forward and a backward pass."""

    kept: int
    """At the end of the forward pass."""
    head: int
    """Peak in the head: at the end of the forward pass, or at the start of the backward pass."""
    block: int
    """Peak in the last block."""
    turn: int
    """Peak in the last block that is computed again, where others behind it are not."""
    between: int
    """Peak in the blocks between the last and the first one."""
    forward: int
    """Peak of the forward pass through the blocks, where an operation needs much besides its result."""
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
            self.touch(node.temporary + node.making)
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
        self.forward = 0
        self.grads: dict[int, Storage] = {}
        self.sent: Counter[int] = Counter()
        self.firsts: dict[int, Storage] = {}

    def walk(self, loss: Tensor, held: int) -> Trace:
        """Run from `loss`; `held` are bytes that only variables hold at the end of the forward pass.

        Segments are the embedding, the blocks, the head.
        """
        live, segments = self.live, self.tape.segments
        for storage in self.tape.kept:
            live.take(storage)
        for segment in segments:
            self._keep(segment)
        kept, forward = live.now, self.forward
        live.touch(held)
        self.grads[id(loss)] = Storage(loss.bytes)
        live.take(self.grads[id(loss)])
        peaks = [0] * len(segments)
        for index in range(len(segments) - 1, -1, -1):
            self._segment(segments[index])
            peaks[index], live.peak = live.peak, live.now
        again = [index for index, segment in enumerate(segments) if segment.checkpointed]
        turn = peaks[again[-1]] if again else 0
        return Trace(kept, peaks[-1], peaks[-2], turn, max(peaks[2:-2], default=0), forward, max(peaks[:2]))

    def _keep(self, segment: Segment) -> None:
        if segment.keeps_entry and segment.entry is not None:
            self.live.take(segment.entry)
        for node in segment.nodes:
            if segment.checkpointed:  # what is computed again are other tensors than those on ctx
                node.held = [self._first(storage) for storage in node.held]
            for storage in node.held if segment.checkpointed else node.saved + node.held:
                self.live.take(storage)
        if making := max((node.making for node in segment.nodes), default=0):
            self.forward = max(self.forward, self.live.now + making)

    def _first(self, storage: Storage) -> Storage:
        """The storage that the first forward pass made where a checkpoint makes another."""
        return self.firsts.setdefault(id(storage), Storage(storage.bytes))

    def _segment(self, segment: Segment) -> None:
        if segment.checkpointed:
            self.live.forward(segment.nodes, saving=True)
        for node in reversed(segment.nodes):
            self._run(node)
        if segment.keeps_entry and segment.entry is not None:
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
