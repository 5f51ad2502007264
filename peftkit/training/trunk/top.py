"""The model that begins at the lowest trained block: its own modules, the full model's tensors, and given states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftkit.errors import TrainingError
from peftkit.training.trunk.frozen import Trunk
from peftkit.training.trunk.states import States
from peftkit.tuning.depth import find_blocks
from peftkit.tuning.skeleton import skeleton
from peftkit.tuning.tuned import Tuned


def top_of(trunk: Trunk, states: States, form: Any) -> Tuned:
    """The tuned model without its trunk: called with `input_ids` and `attention_mask`, it looks their states up.

    A skeleton (tuning/skeleton.py) in which the embeddings give zeros, the trunk's last block gives the states, and
    the blocks below pass on what they get: positions, masks and the number of blocks are the model's own concern.
    `form` is an output of the trunk's last block. The trained parameters are those of the full model.
    """
    tuned = trunk.tuned
    # AdaLoRA writes its ranks into PEFT's config while it trains, and what is saved is the full model.
    model = skeleton(tuned.model, shared=tuned.model.peft_config.values() if tuned.kind == "peft" else ())
    top = replace(tuned, model=model)
    path, blocks = find_blocks(top.inner)
    layers: Any = top.inner.get_submodule(path)
    others = len(form) - 1 if isinstance(form, tuple) else None
    given = _Given(blocks[trunk.top - 1], states, others)
    for at in range(trunk.top - 1):
        layers[at] = _PassedOn(blocks[at], others)
    layers[trunk.top - 1] = given
    _replace(model, top.inner.get_input_embeddings())
    model.register_forward_pre_hook(given.look_up, with_kwargs=True)
    _check_trained(tuned, top)
    return top


class _PassedOn(nn.Module):  # type: ignore[misc]
    """In the place of a block below the last one of the trunk: the next one's input is not looked at."""

    def __init__(self, block: nn.Module, others: int | None) -> None:
        super().__init__()
        # What a model reads from its blocks while it goes through them, such as Qwen-2's attention_type.
        plain = {key: value for key, value in vars(block).items() if isinstance(value, str | int | float | None)}
        self.__dict__.update(plain)
        self._others = others

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The input, in the form of a block's output."""
        return self._formed(hidden_states)

    def _formed(self, states: torch.Tensor) -> Any:
        return states if self._others is None else (states, *[None] * self._others)


class _Given(_PassedOn):
    """In the place of the trunk's last block: it gives the states of the batch that the model was called with."""

    def __init__(self, block: nn.Module, states: States, others: int | None) -> None:
        super().__init__(block, others)
        self._states = states
        self._now: torch.Tensor | None = None

    def look_up(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Find the states of a batch before the model begins with it."""
        if args or kwargs.get("input_ids") is None or kwargs.get("attention_mask") is None:
            raise TrainingError(
                "the model was called without input_ids and attention_mask by name, and its trunk is cached",
                expected="token ids of rows that are in the cache",
                hint="train.trunk_cache=false",
            )
        self._now = self._states.of(kwargs["input_ids"], kwargs["attention_mask"], kwargs.get("token_type_ids"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The states, once for each call of the model."""
        assert self._now is not None  # a call of the model begins with look_up
        states, self._now = self._now, None
        return self._formed(states)


class _Zeros(nn.Module):  # type: ignore[misc]
    """In the place of the embeddings: zeros of their shape and dtype that take no memory."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        weight: Any = table.weight
        self.width, self.dtype = weight.shape[-1], weight.dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Zeros of shape (rows, longest, width)."""
        return torch.zeros((), dtype=self.dtype, device=input_ids.device).expand(*input_ids.shape, self.width)


def _replace(model: nn.Module, table: nn.Module) -> None:
    zeros = _Zeros(table)
    places = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is table]
    for module, key in places:
        module._modules[key] = zeros


def _check_trained(tuned: Tuned, top: Tuned) -> None:
    """What is trained must be what the top computes with: the same parameters, under the same names."""
    own = dict(top.model.named_parameters())
    lost = [name for name, parameter in tuned.trainable.items() if own.get(name) is not parameter]
    if lost:
        raise TrainingError(
            f"{len(lost)} trained tensors are not part of the blocks above the trunk, first {lost[0]}",
            expected="everything that is trained in the upper blocks or behind them",
            hint="train.trunk_cache=false",
        )
