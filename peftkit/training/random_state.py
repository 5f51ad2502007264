"""Every random generator that training may draw from, captured and set back."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of Python, NumPy, torch on the CPU and on the CUDA device, as a checkpoint keeps them."""
    numbers: Any = numpy.random.get_state(legacy=True)  # (name, uint32 keys, position, has_gauss, cached_gaussian)
    return {
        "python": random.getstate(),
        "numpy": (numbers[0], torch.from_numpy(numbers[1].astype("int64")), *numbers[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Draw again from where `capture` was called."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
