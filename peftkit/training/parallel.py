"""Several processes that train as one: which rows are whose, and what they tell one another.

Every process holds all rows and the same schedule, and takes its share of each step. The gradient of a step is the
sum over processes of Σ NLL / (answer tokens of the whole step), which is the gradient of one process on its own; only
the order of the sums differs. With a copy of the base on each process (DDP) nothing is exchanged before the end of a
step: the adapter's gradients are small, and a process that runs out of memory keeps nobody waiting in a collective.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from peftkit.backbone.shard import part_like, whole
from peftkit.errors import TrainingError
from peftkit.process_group import ProcessGroup, launched, take_over

_ENDED = "peftkit/the first process has ended"
_FAREWELL = timedelta(seconds=20)  # torchrun itself waits 30 seconds before it kills


class Team:
    """The processes of a run. All of them call the same methods in the same order; alone, nothing is exchanged."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.size, self.sharded, self.leads = group.rank, group.size, group.sharded, group.leads

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of a step's rows for every process: row counts differ by one at most, and tokens are balanced.

        Rows are dealt from the longest down, forth and back.
        """
        dealt: list[list[int]] = [[] for _ in range(self.size)]
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        for at, index in enumerate(order):
            turn, place = divmod(at, self.size)
            dealt[place if turn % 2 == 0 else self.size - 1 - place].append(index)
        return [sorted(share) for share in dealt]

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return self.most(float(flag)) > 0

    def most(self, value: float) -> float:
        """The largest of the processes' numbers."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum of the processes' numbers."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with all_there():
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        with all_there():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over processes that each hold a whole copy; FSDP has done so in its backward passes."""
        if self.size == 1 or self.sharded:
            return
        pending = []
        with all_there():
            for parameter in parameters:
                if parameter.grad is None:  # no row of this process reached it
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(dist.all_reduce(parameter.grad, async_op=True))
            for work in pending:
                work.wait()

    @property
    def weight(self) -> int:
        """What a process multiplies its loss by: FSDP takes the mean of the processes' gradients, not their sum."""
        return self.size if self.sharded else 1

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise TrainingError naming what is not the same on all processes."""
        told = self.gather(dict(facts))
        for name, value in facts.items():
            if any(other[name] != value for other in told):
                each = ", ".join(f"process {rank}: {other[name]}" for rank, other in enumerate(told))
                raise TrainingError(
                    f"the processes of this run do not have the same {name} ({each})",
                    expected="the same files, settings and packages for every process",
                )

    def _reduced(self, value: float, how: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        with all_there():
            dist.all_reduce(tensor, op=how)
        return float(tensor)


@contextlib.contextmanager
def all_there() -> Iterator[None]:
    """Say what it means when another process has gone away in the middle of an exchange."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(name in str(error) for name in ("gloo", "NCCL")):
            raise
        raise TrainingError(
            f"another process of this run has ended: {str(error).strip().splitlines()[0]}",
            expected="all processes until the end",
            hint="its own message says why",
        ) from error


def team() -> Team:
    """The processes of this run, joined; raises TrainingError when they are not as many as the launcher said."""
    group = take_over()
    if group.size > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda and group.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(group.local_rank)
        # Flags and figures go over gloo also where gradients go over NCCL: a full GPU must not stop them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    found = dist.get_world_size() if dist.is_initialized() else 1
    if found != group.size:
        raise TrainingError(
            f"the launcher started {group.size} processes, and {found} found one another",
            expected="one group of all processes",
            hint="start them all with one `accelerate launch`",
        )
    return Team(group)


def leave(*, in_order: bool) -> None:
    """End the group; when not `in_order`, the others wait until the first process has written how the run ended.

    A launcher ends all processes as soon as one of them has failed, and the first may still be writing.
    """
    if not dist.is_initialized():
        return
    if in_order:
        with all_there():
            dist.barrier()
        dist.destroy_process_group()
        return
    store = dist.distributed_c10d._get_default_store()
    if launched().leads:
        store.set(_ENDED, "1")
        return
    try:
        store.wait([_ENDED], _FAREWELL / 10)
    except RuntimeError:  # the first process may be waiting for this one, and must learn that it is gone
        dist.destroy_process_group()
        with contextlib.suppress(RuntimeError):
            store.wait([_ENDED], _FAREWELL)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits over the bytes of named tensors, whole."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(whole(tensor.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def gathered(state: Any) -> Any:
    """A copy of nested state in which every tensor that is spread over processes is whole."""
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return whole(state.detach()) if isinstance(state, torch.Tensor) else state


def spread(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state as `optimizer.load_state_dict` needs it on this process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {
            key: part_like(value, parameters[number])
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
            else value
            for key, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": parts}
