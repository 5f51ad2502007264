"""What a run has to fit into: the GPU or CPU of this machine, a named card, or a number of bytes."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from peftkit.backbone.spec import QuantSpec
from peftkit.errors import ConfigError
from peftkit.planning.devices import find_device, parse_size, usable
from peftkit.planning.time import Machine, cpu, gpu
from peftkit.render import size

# Any card with bfloat16: what a budget without a card's name stands for.
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Target:
    """A device to plan for."""

    device: Literal["cuda", "cpu"]
    name: str
    bytes: int | None
    """What a process may use of it."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for a CPU."""
    machine: Machine | None
    """How fast it is; None where only its memory is known."""

    def optimizer(self, bits: int) -> str:
        """What `train.optim=auto` is here: as `backbone.decide.optimizer` decides."""
        if self.device == "cpu":
            return "adamw_torch"
        return "paged_adamw_8bit" if bits in (4, 8) else "adamw_torch_fused"


def card(quant: QuantSpec, gpu_name: str | None, budget: str | None) -> Target:
    """A card to plan for without having it: by its name, by its memory, or both.

    Raises ConfigError for an unknown card, a wrong size, or a setting that asks for the CPU.
    """
    if quant.device == "cpu":
        raise ConfigError([f"--gpu {gpu_name} and quant.device=cpu contradict one another"])
    room = parse_size(budget) if budget else None
    if gpu_name is None:
        assert room is not None  # one of the two is given
        return Target("cuda", f"a GPU with {size(room)}", room, _AMPERE, None)
    found = find_device(gpu_name)
    machine = gpu(found, quant.planned_compute_dtype(found.capability))
    if room is not None:
        room = min(room, usable(found.memory_bytes))
        return Target("cuda", f"{size(room)} of the {found.name}", room, found.capability, machine)
    return Target("cuda", f"the {found.name}", usable(found.memory_bytes), found.capability, machine)


def this_machine(quant: QuantSpec, budget: str | None = None) -> Target:
    """The GPU that torch sees, or the CPU with the memory that is free now; with a budget, so many bytes of it."""
    here = _here(quant)
    if budget is None:
        return here
    room = parse_size(budget)
    return replace(here, bytes=room, name=f"{size(room)} of {here.name}")


def has_gpu() -> bool:
    """Whether torch may find a GPU; without a driver it is not imported, which takes two seconds."""
    return any(Path(place).exists() for place in ("/dev/nvidia0", "/dev/dxg")) and _cuda()


def _here(quant: QuantSpec) -> Target:
    if quant.device == "cpu" or not _cuda():
        return Target("cpu", "this machine", psutil.virtual_memory().available, None, _measured_cpu())
    import torch

    name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    free, total = torch.cuda.mem_get_info(0)
    try:
        machine = gpu(find_device(name, total), quant.planned_compute_dtype(capability))
    except ConfigError:  # a card that the table does not know: its speed is for the probe to measure
        machine = None
    return Target("cuda", name, free, capability, machine)


def _cuda() -> bool:
    import torch  # two seconds, which a plan for a named card does not need

    return bool(torch.cuda.is_available())


@functools.cache
def _measured_cpu() -> Machine:
    """FLOP/s of a float32 product of 1024 × 1024 matrices, and bytes/s of a copy of 64 MB; a quarter of a second."""
    import torch

    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    products = _repeats(lambda: left @ right, 0.15)
    block = torch.zeros(16 << 20)
    copies = _repeats(block.clone, 0.1)
    return cpu(products * 2 * 1024**3, copies * 2 * block.numel() * 4)


def _repeats(action: object, seconds: float) -> float:
    """How often a second an action can be done; the first time is not counted."""
    assert callable(action)
    action()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        action()
        count += 1
    return count / elapsed
