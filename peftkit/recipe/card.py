"""The card that is examined, or the CPU in its place: what it is, and what of its memory is in use."""

from __future__ import annotations

import gc
import shutil
import subprocess
from typing import Any, Literal

import psutil
import torch

from peftkit.environment import hardware, versions
from peftkit.errors import BackboneError

Device = Literal["cuda", "cpu"]


def allocated(device: torch.device) -> int:
    """Bytes of live tensors: by CUDA's allocator, or by the garbage collector's list on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and found.device == device]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def free_bytes(device: torch.device) -> int:
    """Bytes that the driver calls free; 0 for a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def check_device(device: Device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", which was built without CUDA,")
        raise BackboneError(
            f"{build} sees no CUDA device, so there is no card to examine",
            expected="an NVIDIA card, its driver, and a CUDA build of torch",
            hint="look at `nvidia-smi` and `peftkit doctor`, or try the procedure on the CPU: peftkit doctor --cpu",
        )


def facts_of(device: Device) -> dict[str, Any]:
    """Versions, processor and card; nothing that names the machine or its owner."""
    facts: dict[str, Any] = {**versions(), **hardware(), "host_memory": psutil.virtual_memory().total}
    if device == "cpu":
        return {**facts, "card": "cpu"}
    found = torch.cuda.get_device_properties(0)
    available, total = torch.cuda.mem_get_info(0)
    return {
        **facts,
        "card": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": total,
        "memory_free": available,
        "cuda": torch.version.cuda,
        **_driver(),
    }


def _driver() -> dict[str, str]:
    """Driver and power limit by nvidia-smi; empty where it is not installed."""
    names, tool = ("driver_version", "power.limit", "clocks.max.sm"), shutil.which("nvidia-smi")
    if tool is None:
        return {}
    asked = [tool, "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (part.strip() for part in answer.split(",")), strict=False))
