"""The bytes that one real training step keeps alive, counted by live storages.

Every tensor that an operation returns names a storage. The ledger notes when a storage is born, by which operation and
in which module, and when it dies; everything else is a sum over these entries. A view adds nothing, and a tensor that
an autograd function keeps on `ctx` counts like any other: `saved_tensors_hooks` alone would not see it (bitsandbytes
keeps the inputs of int8 layers so).

Not seen: what a kernel takes and gives back before it returns (kernels written in Python, such as bitsandbytes', are
looked into), what the allocator adds, and code that `torch.compile` made. Seen too often: under a dispatch mode
autograd adds the gradients of one tensor out of place (`isTensorSubclassLike` in torch's input_buffer.cpp), so a peak
can hold one gradient more than without the ledger; benchmarks/plan_ledger.py compares with the CPU's allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkit.training.holdings import Parts, gradients, held, states

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(eq=False, slots=True)
class Entry:
    """One storage from birth to death; a storage that changes its size is closed and opened anew."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    """Operation that made it; `before` for what was there, `elsewhere` (0 bytes) for an input of unknown origin."""
    module: str | None
    """Qualified name of the innermost module whose forward ran; None outside of the model."""
    born: int
    """Time at which it was made: operations are counted, and 0 is before the step."""
    died: int | None = None
    """Last time at which it was alive; None while it is."""

    def lives(self, at: int) -> bool:
        """Whether it was alive at a time."""
        return self.born <= at and (self.died is None or self.died >= at)


@dataclass(frozen=True)
class Account:
    """What one step held, in bytes on the model's device."""

    weights: int
    """Parameters, buffers and quantization state, before the step."""
    before: int
    """Alive before the step: the weights, and gradients and optimizer state of earlier steps."""
    kept: int
    """Made in the step and alive when the backward pass begins, but no gradient of a parameter: activations, logits,
    the batch, and the loss's own gradient of one number. The largest of the step's micro-batches."""
    kept_by: dict[str, int]
    """`kept` by the part that made it: embeddings, blocks, head, rest of the model, outside (batch and loss)."""
    saved: int
    """The share of `kept` that autograd saved; the rest is on a function's `ctx` or in a variable."""
    gradients: int
    """Gradients of parameters, the most after any backward pass."""
    optimizer: int
    """The optimizer's state after the step."""
    peak: int
    """Most bytes alive at once, less `before`."""
    peak_by: dict[Phase, int]
    """`peak` of each phase. A phase lasts until the next one begins: with the model's first module, with the first
    operation of autograd's backward pass, with the optimizer's step."""
    alive_after: int
    """Made in the step, alive after it, and neither gradient nor optimizer state: anything but 0 is a leak."""


class Ledger:
    """Record one step: `with Ledger(model, optimizer) as ledger: ...`, and then `ledger.account()`.

    Forward, backward and optimizer phases are told apart by what autograd and the optimizer do. Storages on other
    devices than the model's are left out.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        self.entries: list[Entry] = []
        self.kept: list[Entry] = []
        self.leaked: list[Entry] = []
        self.clock = 0
        self._live: dict[int, tuple[Entry, weakref.ref[Any]]] = {}
        self._turns: list[tuple[int, Phase]] = [(0, "forward")]
        self._saved: set[Entry] = set()
        self._kept_saved = self._gradients = self._optimizer = 0
        self._names = {id(module): name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._hooks = ExitStack()
        self._weights = _bytes(self._opened(held(model)))
        self._opened(gradients(model))
        self._opened(states(optimizer))

    def __enter__(self) -> Self:
        with ExitStack() as hooks:
            hooks.callback(register_module_forward_pre_hook(self._enter_module).remove)
            hooks.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
            if self.optimizer is not None:
                hooks.callback(self.optimizer.register_step_pre_hook(lambda *_: self.turn("optimizer")).remove)
            hooks.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
            hooks.enter_context(_Watch(self))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        self._end_backward()
        state = self._known(states(self.optimizer))
        self._optimizer = _bytes(state)
        expected = state | self._known(gradients(self.model))
        self.leaked = [entry for entry in self._born() if entry not in expected]
        self._live.clear()

    def account(self) -> Account:
        """The step's sums; call it after the `with` block."""
        levels = self._levels()
        peaks = {phase: max((levels[at] for at in self._times(phase)), default=levels[0]) for phase in PHASES}
        return Account(
            weights=self._weights,
            before=levels[0],
            kept=_bytes(self.kept),
            kept_by=self._by_part(self.kept),
            saved=self._kept_saved,
            gradients=self._gradients,
            optimizer=self._optimizer,
            peak=max(peaks.values()) - levels[0],
            peak_by={phase: peak - levels[0] for phase, peak in peaks.items()},
            alive_after=_bytes(self.leaked),
        )

    def _by_part(self, entries: Iterable[Entry]) -> dict[str, int]:
        parts = Parts(self.model)
        found = dict.fromkeys(parts.names, 0)
        for entry in entries:
            found[parts.of(entry.module)] += entry.bytes
        return found

    def at_peak(self) -> list[Entry]:
        """What the step had made and held when the most bytes were alive."""
        levels = self._levels()
        at = levels.index(max(levels))
        return [entry for entry in self.entries if entry.born and entry.lives(at)]

    def note(self, func: Any, inputs: list[Any], outputs: list[Any]) -> None:
        """Time passes: an operation returned."""
        self.clock += 1
        name = str(func)
        if not name.startswith("aten.lift_fresh"):  # its input is the new tensor of torch.tensor(...)
            for tensor in inputs:
                self._see(tensor, "elsewhere")
        for tensor in outputs:
            self._see(tensor, name)

    def turn(self, phase: Phase) -> None:
        """The next operation belongs to `phase`."""
        last = self._turns[-1][1]
        if phase == last:
            return
        self.clock += 1  # what died since the last operation is not alive now
        self._turns.append((self.clock, phase))
        if phase == "backward":
            self._begin_backward()
        elif last == "backward":
            self._end_backward()

    def _begin_backward(self) -> None:
        earlier = self._known(gradients(self.model))
        kept = [entry for entry in self._born() if entry not in earlier]
        if _bytes(kept) > _bytes(self.kept):
            self.kept, self._kept_saved = kept, _bytes(self._saved.intersection(kept))

    def _end_backward(self) -> None:
        self._gradients = max(self._gradients, _bytes(self._known(gradients(self.model))))
        self._saved.clear()

    def _see(self, value: Any, operation: str) -> Entry | None:
        if not isinstance(value, torch.Tensor) or value.device != self.device or value.layout != torch.strided:
            return None
        storage = value.untyped_storage()
        key = storage._cdata
        entry, _ = self._live.get(key, (None, None))
        if entry is not None and (entry.bytes == storage.nbytes() or entry.operation == "elsewhere"):
            return entry
        if entry is not None:
            entry.died = self.clock - 1
        size = 0 if operation == "elsewhere" and entry is None else storage.nbytes()
        module = self._running[-1] if self._running else None
        opened = Entry(size, tuple(value.shape), value.dtype, operation, module, self.clock)
        self.entries.append(opened)
        self._live[key] = (opened, weakref.ref(storage, lambda _: self._close(key, opened)))
        return opened

    def _close(self, key: int, entry: Entry) -> None:
        entry.died = self.clock
        if key in self._live and self._live[key][0] is entry:
            del self._live[key]

    def _opened(self, tensors: Iterable[torch.Tensor]) -> set[Entry]:
        return {entry for tensor in tensors if (entry := self._see(tensor, "before")) is not None}

    def _known(self, tensors: Iterable[torch.Tensor]) -> set[Entry]:
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return {self._live[key][0] for key in keys if key in self._live}

    def _born(self) -> list[Entry]:
        """What the step has made and still holds."""
        return [entry for entry, _ in self._live.values() if entry.born]

    def _levels(self) -> list[int]:
        """Bytes alive at every time."""
        change = [0] * (self.clock + 2)
        for entry in self.entries:
            change[entry.born] += entry.bytes
            if entry.died is not None:
                change[entry.died + 1] -= entry.bytes
        return list(accumulate(change[:-1]))

    def _times(self, phase: Phase) -> Iterator[int]:
        ends = [start for start, _ in self._turns[1:]] + [self.clock + 1]
        for (start, name), end in zip(self._turns, ends, strict=True):
            if name == phase:
                yield from range(start, end)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        entry = self._see(tensor, "elsewhere")
        if entry is not None:
            self._saved.add(entry)
        # An operation that saves its own result would hold itself if it got that back, in a graph that is not run.
        return tensor.detach()

    def _enter_module(self, module: torch.nn.Module, inputs: Any) -> None:
        if id(module) not in self._names:
            return
        self._running.append(self._names[id(module)])
        if not in_backward():  # where checkpointing runs modules again
            self.turn("forward")

    def _leave_module(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name in self._running:  # a recomputation that stops early leaves several at once
            del self._running[len(self._running) - 1 - self._running[::-1].index(name) :]


_MADE = torch._C.DispatchKey.CompositeImplicitAutograd


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Tells a ledger of every operation."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, ledger.device.type.upper()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if in_backward():
            self.ledger.turn("backward")
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _MADE):
            with self:  # an operation that is made of others arrives whole where autograd is off for good
                result = func._op_dk(_MADE, *args, **kwargs)
        elif func.namespace in ("aten", "prim", "prims"):
            result = func(*args, **kwargs)
        else:  # a kernel that may be written in Python: watch what it does inside
            with self:
                result = func.redispatch(self.keys, *args, **kwargs)
        self.ledger.note(func, tree_leaves((args, kwargs)), tree_leaves(result))
        return result


def in_backward() -> bool:
    """Whether autograd is running a backward pass, in this thread or for it."""
    return bool(torch._C._current_graph_task_id() != -1)


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.bytes for entry in entries)
