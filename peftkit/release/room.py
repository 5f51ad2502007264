"""Whether a base in some precision fits into the memory that is free, so that it can be measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil
import torch

from peftkit.backbone.decide import place
from peftkit.backbone.spec import QuantSpec
from peftkit.base.raw import tensors, weight_files
from peftkit.base.ref import read_config
from peftkit.data.part import Part
from peftkit.errors import BaseError
from peftkit.planning.architecture import architecture
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.release.measured import NotMeasured
from peftkit.render import size


def lacking(folder: Path, quant: QuantSpec, part: Part, *, batch_size: int, besides: int = 0) -> NotMeasured | None:
    """The reason not to measure a base held as `quant` says; None where it fits. `besides` are bytes held with it."""
    need, free = needed(folder, quant, part, batch_size=batch_size) + besides, available(quant)
    if need <= free:
        return None
    return NotMeasured(f"needs {size(need)}, {size(free)} are free", "close other programs, or use a larger machine")


def needed(folder: Path, quant: QuantSpec, part: Part, *, batch_size: int) -> int:
    """Bytes to load a base and score `part` with it, on top of what this process holds already.

    Architectures that are not known to the plan count as all their weights in the dtype they are loaded in, and a
    quarter more for what a forward pass needs.
    """
    dtype = str(place(quant).dtype).removeprefix("torch.")
    try:
        shape = architecture(read_config(folder))
    except BaseError:
        return int(_numbers(folder) * getattr(torch, dtype).itemsize * 1.25)
    plan = plan_memory(shape, _setting(quant, dtype, part, batch_size))
    around = plan.part("context").bytes.expected  # this process runs already
    return max(plan.stage(stage).bytes.expected for stage in ("load", "evaluate")) - around


def available(quant: QuantSpec) -> int:
    """Bytes that are free on the device that `quant` would load on."""
    device = place(quant).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _setting(quant: QuantSpec, dtype: str, part: Part, batch_size: int) -> Setting:
    longest = max(len(example.input_ids) for example in part.examples)
    placement = place(quant)
    values: dict[str, Any] = {
        "bits": quant.bits,
        "double_quant": quant.double_quant,
        "compute_dtype": str(placement.compute_dtype).removeprefix("torch."),
        "dtype": dtype,
        "device": placement.device.type,
        "evaluation_batch": batch_size,
        "evaluation_longest": longest,
        "max_new_tokens": 0,
        "longest": longest,
        "labelled": min(longest, max(example.answer_tokens for example in part.examples)),
        "micro_batch": 1,
        "rows_per_step": 1,
    }
    return Setting(**values)


def _numbers(folder: Path) -> int:
    return sum(math.prod(shape) for file in weight_files(folder) for _, _, shape, _, _ in tensors(file))
