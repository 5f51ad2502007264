"""The part of a model that training leaves alone: which blocks it is, and what it computes for a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peftkit.errors import OutOfMemory, TrainingError
from peftkit.generation.forward import autocast
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.memory import release
from peftkit.training.passes.paths import Paths
from peftkit.training.trunk.passes import Pass
from peftkit.tuning.depth import find_blocks
from peftkit.tuning.methods import METHODS
from peftkit.tuning.tuned import Tuned

_LOOKED_AT = 8


class _Enough(Exception):
    """Ends a forward pass: what it was for has been seen."""


@dataclass(frozen=True)
class Trunk:
    """The embeddings and the blocks below `top` of a tuned model."""

    tuned: Tuned
    top: int
    """Index of the lowest block that is trained; the number of blocks where only what stands behind them is."""
    paths: Paths = field(default_factory=Paths)
    """How rows go through the model."""

    @property
    def blocks(self) -> tuple[torch.nn.Module, ...]:
        """The blocks of the trunk, from the embeddings up; at least one."""
        return find_blocks(self.tuned.inner)[1][: self.top]

    @property
    def embeddings(self) -> torch.nn.Module:
        """The table of the token embeddings."""
        table: torch.nn.Module = self.tuned.inner.get_input_embeddings()
        return table

    def output(self, one: Pass) -> Any:
        """What the trunk's last block gives for a batch: states of shape (rows, longest, hidden), or a tuple of them
        and None."""
        seen: list[Any] = []

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise _Enough

        backbone = self.tuned.backbone
        options: dict[str, Any] = {"flat": False, "pad_id": backbone.tokenizer.pad_id, "device": backbone.device}
        hook = self.blocks[-1].register_forward_hook(keep)
        try:
            self.tuned.model.train(one.training)
            with (
                torch.no_grad(),
                autocast(backbone.device, backbone.placement.compute_dtype),
                contextlib.suppress(_Enough),
                self.paths.laid(self.tuned.model, one.rows, **options) as batch,
            ):
                self.tuned.model(**self.paths.inputs(batch))
        finally:
            hook.remove()
            self.tuned.model.eval()
        return seen[0]

    def states(self, one: Pass) -> list[torch.Tensor]:
        """The states of each row of a batch, of shape (length, hidden) on the CPU; in halves if memory asks.

        Raises OutOfMemory when one row at a time is still too much.
        """
        try:
            found = hidden(self.output(one)).cpu()
            return [states[: len(row.input_ids)] for states, row in zip(found, one.rows, strict=True)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            check_divisible(one, error)
        release(self.tuned.backbone.device)
        return [states for part in one.halves for states in self.states(part)]


def check_divisible(one: Pass, error: BaseException) -> None:
    """Raise OutOfMemory where a batch that did not fit is a single row."""
    if len(one.rows) == 1:
        raise OutOfMemory(
            f"out of memory before step 1, with a single row of {len(one.rows[0].input_ids):,} tokens: a cached trunk "
            "is computed and compared with the whole model in memory",
            expected="room for one row, without gradients",
            hint="lower data.max_length, or hold the base in fewer bits (quant.bits=4)",
        ) from error


def hidden(output: Any) -> torch.Tensor:
    """The states in a block's output; raises TrainingError where it gives anything beside them."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    if not isinstance(first, torch.Tensor) or first.dim() != 3 or any(value is not None for value in rest):
        raise TrainingError(
            "the blocks of this model give more than hidden states to the next one",
            expected="one tensor of shape (rows, positions, hidden)",
            hint="train.trunk_cache=false",
        )
    return first


def frozen_trunk(tuned: Tuned, paths: Paths | None = None) -> Trunk:
    """Find what lies below everything that is ever trained: the blocks whose output needs no gradient.

    Found by a forward pass over a few tokens, and by where the trained tensors hang: an expert that no token chose
    would not be seen otherwise. Raises TrainingError where there is no such block.
    """
    inner = tuned.inner
    _, blocks = find_blocks(inner)
    layers = getattr(inner.config.get_text_config(), "num_hidden_layers", len(blocks))
    if layers != len(blocks):  # ALBERT calls one block for all its layers
        raise TrainingError(
            f"{type(inner).__name__} has {layers} layers and {len(blocks)} blocks: one is called several times",
            expected="a block for each layer",
            hint="train.trunk_cache=false",
        )
    trained = {id(parameter) for parameter in tuned.trainable.values()}
    holding = [any(id(parameter) in trained for parameter in block.parameters()) for block in blocks]
    paths = paths or Paths()
    top = min(_first(holding), _first(_need_gradients(tuned, blocks, paths)))
    if top == 0:
        raise TrainingError(
            f"train.trunk_cache needs frozen blocks, and what is trained reaches the first of {len(blocks)}: "
            f"{_reaching(tuned, blocks)}",
            expected="everything that is trained in the upper blocks or behind them",
            hint="; or ".join([*_how_to_train_less(tuned), "train.trunk_cache=false"]),
        )
    return Trunk(tuned, top, paths)


def _reaching(tuned: Tuned, blocks: tuple[torch.nn.Module, ...]) -> str:
    """The first trained tensor of the first block, or else the first one that stands in none."""
    names = {id(parameter): name for name, parameter in tuned.trainable.items()}
    inside = [[names[id(each)] for each in block.parameters() if id(each) in names] for block in blocks]
    held = {name for block in inside for name in block}
    return next((name for name in (*inside[0], *names.values()) if name in inside[0] or name not in held), "nothing")


def _how_to_train_less(tuned: Tuned) -> list[str]:
    fields = METHODS[tuned.spec.method].fields
    if "top_layers" in fields:
        return ["lower adapter.top_layers"] if tuned.spec.top_layers else []
    return [("adapter.layers=top:8, or " if "layers" in fields else "") + "adapter.method=top_layers"]


def _need_gradients(tuned: Tuned, blocks: tuple[torch.nn.Module, ...], paths: Paths) -> list[bool]:
    """Whether each block's output depends on a trained tensor, frozen for a while or not; up to the first that does."""
    found: list[bool] = []

    def look(module: torch.nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        found.append(bool(first.requires_grad))
        if found[-1]:
            raise _Enough

    backbone = tuned.backbone
    ids = torch.arange(_LOOKED_AT, device=backbone.device)[None]
    with _all_trained(tuned), contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(look).remove)
        with (
            torch.enable_grad(),
            autocast(backbone.device, backbone.placement.compute_dtype),
            contextlib.suppress(_Enough),
        ):
            tuned.model(**paths.inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    return found


@contextlib.contextmanager
def _all_trained(tuned: Tuned) -> Iterator[None]:
    parameters = list(tuned.trainable.values())
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _first(flags: list[bool]) -> int:
    return flags.index(True) if True in flags else len(flags)


def drew(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a generator of torch or Python has moved between two captures of `training.random_state`."""
    moved = [not torch.equal(before[name], after[name]) for name in ("torch", "cuda") if before[name] is not None]
    return any(moved) or bool(before["python"] != after["python"])
