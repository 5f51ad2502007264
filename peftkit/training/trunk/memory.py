"""A trunk that nobody calls gives its memory back: its tensors' storages shrink to nothing, and come back bit for bit.

Every tensor, module and quantization constant stays the object that it is; FSDP resizes storages in the same way
(torch/distributed/fsdp/_flat_param.py, `_free_storage`). The bytes wait in a scratch file without a name, which is
gone when the process ends. Storages that are mapped from the base's files cannot be resized, and cost nothing: the
kernel drops their pages when memory is short.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from peftkit.errors import TrainingError
from peftkit.training.holdings import held
from peftkit.training.trunk.frozen import Trunk
from peftkit.training.trunk.store import require_room
from peftkit.tuning.depth import find_blocks
from peftkit.tuning.tuned import Tuned


@contextmanager
def released(trunk: Trunk, top: Tuned, scratch: Path) -> Iterator[int]:
    """Free what only the trunk holds; yields the bytes. Calling the full model meanwhile is a TrainingError.

    Raises TrainingError, before anything is freed, when the disk of `scratch` has no room for these bytes.
    """
    storages = only_in(trunk.tuned.model, top.model)
    total = sum(storage.nbytes() for storage in storages)
    require_room(scratch, total, "the released trunk's weights")
    with tempfile.TemporaryFile(dir=scratch) as file, ExitStack() as undo:
        sizes = [_put(storage, file) for storage in storages]
        undo.callback(_restore, storages, sizes, file)
        for storage in storages:
            storage.resize_(0)
        undo.enter_context(_guarded(trunk))
        yield total


def only_in(full: torch.nn.Module, top: torch.nn.Module) -> list[torch.UntypedStorage]:
    """Storages that `full` holds and `top` does not, and that can be resized; each once."""
    needed = {tensor.untyped_storage()._cdata for tensor in held(top)}
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in held(full):
        storage = tensor.untyped_storage()
        if storage._cdata not in needed and storage.resizable() and storage.nbytes():
            found[storage._cdata] = storage
    return list(found.values())


@contextmanager
def _guarded(trunk: Trunk) -> Iterator[None]:
    """A kernel that reads a tensor without a storage would crash the process."""
    base = trunk.tuned.backbone.model
    modules: Sequence[torch.nn.Module] = (
        trunk.embeddings,
        *trunk.blocks,
        base.get_input_embeddings(),
        *find_blocks(base)[1][: trunk.top],
    )
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(_refuse).remove)
        yield


def _refuse(module: torch.nn.Module, args: Any) -> None:
    raise TrainingError(
        "the whole model was called while training has released its trunk's memory",
        expected="calls of the model before or after training",
        hint="train.trunk_cache=false",
    )


def _put(storage: torch.UntypedStorage, file: IO[bytes]) -> int:
    copied = _bytes(storage).to("cpu", copy=True)  # numpy() makes a storage that can no longer be resized
    file.write(memoryview(copied.numpy()))
    return int(storage.nbytes())


def _restore(storages: Sequence[torch.UntypedStorage], sizes: Sequence[int], file: IO[bytes]) -> None:
    file.seek(0)
    for storage, size in zip(storages, sizes, strict=True):
        storage.resize_(size)
        data = torch.empty(size, dtype=torch.uint8)
        _read(file, memoryview(data.numpy()))
        _bytes(storage).copy_(data)


def _read(file: IO[bytes], into: memoryview) -> None:
    while into:
        count = file.readinto(into)  # type: ignore[attr-defined]
        if not count:
            raise TrainingError("the released trunk's weights cannot be read back", hint="load the base again")
        into = into[count:]


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
