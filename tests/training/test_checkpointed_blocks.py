"""Checkpointing of the lowest blocks alone: which blocks are computed twice, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from peftkit.data.chat import Example
from peftkit.errors import OutOfMemory, TrainingError
from peftkit.events import Warned
from peftkit.training.journal import Journal
from peftkit.training.memory import checkpoint_activations, keep_activations, within_memory
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned

Rows = Callable[..., list[Example]]
Make = Callable[..., Tuned]


def passes(tuned: Tuned) -> list[int]:
    """How often each block's MLP runs, counted from here on."""
    layers = tuned.inner.model.layers
    counts = [0] * len(layers)
    for at, layer in enumerate(layers):

        def count(*args: Any, at: int = at) -> None:
            counts[at] += 1

        layer.mlp.register_forward_pre_hook(count)
    return counts


def gradients(tuned: Tuned, rows: Rows, blocks: int | None, *, on: bool = True) -> tuple[list[int], list[torch.Tensor]]:
    if on:
        checkpoint_activations(tuned, blocks)
    tuned.model.train()
    counts = passes(tuned)
    Step(tuned.model, rows((9, 12)), pad_id=2, device=torch.device("cpu")).run(1000)
    found = [parameter.grad.clone() for parameter in tuned.trainable.values() if parameter.grad is not None]
    keep_activations(tuned)
    assert len(found) == len(tuned.names)
    return counts, found


@pytest.mark.parametrize("bits", [4, 32])
def test_the_lowest_blocks_are_computed_twice_and_gradients_stay_the_same(tuned: Make, rows: Rows, bits: int) -> None:
    plain, kept = gradients(tuned(bits=bits), rows, None, on=False)
    one, some = gradients(tuned(bits=bits), rows, 1)
    every, all_of_them = gradients(tuned(bits=bits), rows, None)
    assert plain == [1] * len(plain)
    assert one == [2, *[1] * (len(plain) - 1)]
    assert every == [2] * len(plain)
    for others in (some, all_of_them):
        assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))


def test_a_run_recomputes_as_many_as_it_was_told(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=4)
    before = passes(model)
    train(model, rows((9, 12)), TrainSpec(max_steps=1), tmp_path)
    tried = [count - 1 for count in before]  # the passes that find the shortcuts
    model = tuned(bits=4)
    counts = passes(model)
    train(model, rows((9, 12)), TrainSpec(max_steps=1, gradient_checkpointing=True, checkpointed_blocks=1), tmp_path)
    assert [count - more for count, more in zip(counts, tried, strict=True)] == [2, *[1] * (len(counts) - 1)]
    assert not any(layer.gradient_checkpointing for layer in model.inner.model.layers)


def test_more_memory_is_found_by_recomputing_all(tuned: Make, rows: Rows) -> None:
    model, said = tuned(bits=4), list[Any]()
    checkpoint_activations(model, 1)
    journal = Journal(tokens_at_once=1, gradient_checkpointing=True, checkpointed_blocks=1)
    step = Step(model.model, rows((5, 9)), pad_id=2, device=torch.device("cpu"), forward=_Exhausted)
    with pytest.raises(OutOfMemory, match="and with checkpointing"):
        within_memory(step, journal, model, said.append)
    texts = [event.text for event in said if isinstance(event, Warned)]
    assert len(texts) == 1
    assert "with gradient checkpointing of all blocks, and so from here on" in texts[0]
    assert journal.checkpointed_blocks is None
    assert all(layer.gradient_checkpointing for layer in model.inner.model.layers)
    assert journal.concedes(TrainSpec(gradient_checkpointing=True, checkpointed_blocks=1))
    keep_activations(model)


def test_blocks_without_checkpointing_are_refused() -> None:
    with pytest.raises(ValidationError, match="checkpointed_blocks needs gradient_checkpointing=true"):
        TrainSpec(checkpointed_blocks=2)


def test_a_model_that_checkpoints_as_a_whole_is_refused(tuned: Make) -> None:
    model = tuned(bits=4)
    layers = model.inner.model.layers
    layers[0] = torch.nn.Sequential(layers[0])
    with pytest.raises(TrainingError, match="cannot checkpoint its blocks one by one"):
        checkpoint_activations(model, 1)


class _Exhausted:
    """A forward pass that asks for an exbibyte."""

    def __enter__(self) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    def __exit__(self, *error: object) -> None:
        """Never reached."""
