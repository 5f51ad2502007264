"""Whether an error means that memory ran out."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))
