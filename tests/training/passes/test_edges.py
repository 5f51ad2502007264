"""Where shortcuts could have gone wrong: found by a review, one model or one accident each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.passes.lab import CPU, VOCABULARY, adapted, apart, gradients, tiny, turns
from transformers import LlamaForCausalLM

from peftkit.data.chat import Example
from peftkit.errors import OutOfMemory, TrainingError
from peftkit.events import Warned
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.journal import Journal
from peftkit.training.memory import keep_activations, within_memory
from peftkit.training.passes.flat import attention_by_row
from peftkit.training.passes.head import Head, summed_loss
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.trying import find_paths
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned


class InPlace(nn.Module):  # type: ignore[misc]
    """A linear layer whose caller goes on in place with its result, as Gemma 3n does with a projection."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        result *= 0.5
        return result


@pytest.mark.parametrize("bits", [16, 32])
def test_a_model_that_goes_on_in_place_trains_as_it_does_plainly(bits: int) -> None:
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    found = []
    for fused in (False, True):
        model = tiny("LlamaForCausalLM", dtype=dtype)
        for layer in model.model.layers:
            layer.mlp.up_proj = InPlace(layer.mlp.up_proj)
        tuned = adapted(model)
        tuned.model.train()
        Step(tuned.model, turns((9, 12)), pad_id=2, device=CPU, paths=Paths(fused=fused)).run(1000)
        found.append(gradients(tuned.model))
    assert apart(found[1], found[0]) < (1e-5 if bits == 32 else 0.05)


def test_the_gradients_of_a_16_bit_head_are_not_scaled_by_a_rounding() -> None:
    """1 / 173 in bfloat16 is off by 0.2 %, and with it every gradient of the step was."""
    torch.manual_seed(0)
    head = Head(nn.Linear(64, VOCABULARY, bias=False).requires_grad_(False), VOCABULARY)
    states, targets = torch.randn(173, 64), torch.randint(VOCABULARY, (173,))
    exact = states.double().requires_grad_()
    weight = head.module.weight.to(torch.bfloat16)
    (nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="sum") / 173).backward()
    head.module.to(torch.bfloat16)
    low = states.to(torch.bfloat16).requires_grad_()
    (summed_loss(head, low, targets)[0] / 173).backward()
    assert exact.grad is not None
    assert low.grad is not None
    share = float((low.grad.double() * exact.grad).sum() / exact.grad.square().sum())
    assert abs(share - 1) < 1e-3


def test_parts_of_a_model_get_back_the_attention_that_they_had() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})

    def kernels() -> list[str]:
        return [part._attn_implementation for part in (model.config, config.text_config, config.vision_config)]

    before = kernels()
    assert before == ["sdpa", "sdpa", "eager"]
    with attention_by_row(model):
        assert kernels()[1] != "sdpa"
    assert kernels() == before


class Exhausted(LlamaForCausalLM):  # type: ignore[misc]
    """Has no memory for rows laid flat."""

    def forward(self, input_ids: Any, position_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        if position_ids is not None:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)


def test_no_memory_in_a_trial_is_not_taken_for_an_answer() -> None:
    with pytest.raises(OutOfMemory, match="out of memory in a pass of 24 tokens"):
        find_paths(adapted(tiny("LlamaForCausalLM", kind=Exhausted)))


def test_a_micro_batch_that_lies_flat_is_no_longer_than_a_window() -> None:
    """Llama 4's temperature counts places in the call, and begins where a chunk ends."""
    batches = Paths(flat=True, longest=20).micro_batches([12, 12, 5, 5, 30], 100)
    assert all(sum((12, 12, 5, 5, 30)[at] for at in batch) <= 20 for batch, flat in batches if flat)
    assert [batch for batch, flat in batches if not flat] == [[4]]


def test_virtual_tokens_count() -> None:
    """20-token rows behind 100 virtual ones: as many as the longest rows, 10 at once, would bring, and no more."""
    batches = Paths(virtual_tokens=100).micro_batches([20] * 101 + [200], 2000)
    assert max(len(batch) for batch, _ in batches) * 120 <= 2000 + 10 * 100


def test_one_long_row_among_many_short_ones_costs_nothing_but_its_own_checkpointing(
    tuned: Callable[..., Tuned],
) -> None:
    """The row that does not fit is alone already: fewer tokens at once would not help it."""
    model, said = tuned(bits=4), list[Any]()
    journal = Journal(tokens_at_once=30, gradient_checkpointing=False)
    rows = turns([30, *[3] * 20])
    step = Step(model.model, rows, pad_id=2, device=CPU, forward=_NoRoom)
    with pytest.raises(OutOfMemory, match="a single row of 30 tokens, and with checkpointing"):
        within_memory(step, journal, model, said.append)
    texts = [event.text for event in said if isinstance(event, Warned)]
    assert len(texts) == 1
    assert "with one row of 30 tokens: the step is repeated with gradient checkpointing" in texts[0]
    assert journal.tokens_at_once == 30
    keep_activations(model)


class _NoRoom:
    """A forward pass that asks for an exbibyte."""

    def __enter__(self) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    def __exit__(self, *error: object) -> None:
        """Never reached."""


def test_flat_rows_where_rows_are_needed_side_by_side_are_refused(
    tuned: Callable[..., Tuned], rows: Callable[..., list[Example]], tmp_path: Path
) -> None:
    spec = TrainSpec.model_validate({"max_steps": 1, "regularize": {"r_drop": 1.0}})
    with pytest.raises(TrainingError, match=r"paths\.flat is set"):
        train(tuned(bits=4, lora_dropout=0.1), rows((9, 12)), spec, tmp_path, paths=Paths(flat=True))


def test_a_run_is_not_resumed_by_other_passes(
    tuned: Callable[..., Tuned], rows: Callable[..., list[Example]], tmp_path: Path
) -> None:
    kept, spec = Checkpoints(tmp_path / "kept"), TrainSpec(max_steps=2, save_steps=1)
    train(tuned(bits=4), rows((9, 12)), spec, tmp_path, checkpoints=kept)
    with pytest.raises(
        TrainingError, match=r"took these shortcuts: rows without padding, .*; now they would take: none"
    ):
        train(tuned(bits=4), rows((9, 12)), spec, tmp_path, checkpoints=kept, start=kept.load(1), paths=Paths())
