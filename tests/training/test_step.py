"""One optimizer step: the same gradients however it is split, repeatable draw by draw, never a NaN in silence."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from peftkit.data.chat import IGNORED, Example
from peftkit.errors import TrainingError
from peftkit.training import random_state
from peftkit.training.step import Step

CPU = torch.device("cpu")
RAGGED = (3, 60, 11, 7, 33, 5, 90, 21)
WHOLE = len(RAGGED) * max(RAGGED)
"""Tokens of all eight rows side by side."""


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient tensor, relative to its norm."""
    assert first
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / second[name].norm()) for name in first)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_one_batch_of_eight_is_eight_of_one(
    tiny_base: Path, rows: Callable[..., list[Example]], dtype: torch.dtype, limit: float
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).train()
    step = Step(model, rows(RAGGED), pad_id=2, device=CPU)
    whole = step.run(WHOLE)
    assert whole.micro_batches == 1
    expected = gradients(model)
    assert len(expected) > 15
    # Padded, the shortest first: 90 tokens are 3 5 7 11 | 21 33 | 60 | 90, and 180 are 3 5 7 11 21 | 33 60 | 90.
    for tokens, batches in ((1, 8), (90, 4), (180, 3), (WHOLE - 1, 2), (WHOLE, 1), (100_000, 1)):
        result = step.run(tokens)
        assert result.micro_batches == batches
        assert result.loss == pytest.approx(whole.loss, rel=limit)
        assert apart(gradients(model), expected) <= limit


def test_one_batch_is_many_through_nf4(tuned: Callable[..., Any], rows: Callable[..., list[Example]]) -> None:
    model = tuned(bits=4).model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    step = Step(model, rows(RAGGED), pad_id=2, device=CPU)
    assert step.run(WHOLE).micro_batches == 1
    expected = gradients(model)
    assert step.run(1).micro_batches == len(RAGGED)
    assert apart(gradients(model), expected) <= 1e-6


@pytest.mark.full
@pytest.mark.base
def test_one_batch_is_many_on_the_embedded_base(embedded: Path, rows: Callable[..., list[Example]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).train()
    step = Step(model, rows(RAGGED), pad_id=2, device=CPU)
    assert step.run(WHOLE).micro_batches == 1
    expected = gradients(model)
    assert step.run(1).micro_batches == len(RAGGED)
    assert apart(gradients(model), expected) <= 2e-5


class Certain(nn.Module):
    """A model of two tokens whose NLL of a token is 2 nats in rows of token 0 and 1 nat in rows of token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        wanted = torch.where(input_ids[:, :1] == 0, 2.0, 1.0).expand(input_ids.shape)
        probability = torch.exp(-wanted)
        own = torch.log(probability / (1 - probability)) + self.shift
        zero, one = own * (input_ids == 0), own * (input_ids == 1)
        return SimpleNamespace(logits=torch.stack([zero, one], dim=-1))


def certain_rows() -> list[Example]:
    """8 tokens at 2.0 and 120 tokens at 1.0."""
    return [
        Example([token] * (n + 1), [IGNORED] + [token] * n, 1, i, f"row {i}")
        for i, (token, n) in enumerate([(0, 8), (1, 120)])
    ]


@pytest.mark.parametrize(("tokens", "micro_batches"), [(1, 2), (2 * 121, 1)])
def test_tokens_weigh_the_same_in_long_and_short_answers(tokens: int, micro_batches: int) -> None:
    result = Step(Certain(), certain_rows(), pad_id=0, device=CPU).run(tokens)
    assert result.loss == pytest.approx(1.0625, abs=1e-6), "1.5 is the mean of the two rows' means"
    assert (result.answer_tokens, result.tokens) == (128, 130)
    assert result.micro_batches == micro_batches


@pytest.mark.parametrize("tokens", [1, 2 * 121])
def test_the_gradient_is_weighed_by_tokens_too(tokens: int) -> None:
    model = Certain()
    Step(model, certain_rows(), pad_id=0, device=CPU).run(tokens)
    # d nll / d shift = p - 1 for the token that is always right
    expected = (8 * (math.exp(-2) - 1) + 120 * (math.exp(-1) - 1)) / 128
    assert float(model.shift.grad) == pytest.approx(expected, rel=1e-6)


def test_the_first_token_of_a_row_is_never_predicted(rows: Callable[..., list[Example]]) -> None:
    step = Step(Certain(), [Example([1] * 4, [1] * 4, 0, 0, "text")], pad_id=0, device=CPU)
    assert step.answer_tokens == 3


@pytest.mark.parametrize("tokens", [1, 180, WHOLE])
def test_repeating_a_step_draws_the_same_dropout(
    tuned: Callable[..., Any], rows: Callable[..., list[Example]], tokens: int
) -> None:
    model = tuned(bits=4, lora_dropout=0.3).model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    step = Step(model, rows(RAGGED), pad_id=2, device=CPU)
    first = step.run(tokens)
    expected = gradients(model)
    after = torch.get_rng_state()
    torch.rand(100)  # something else draws in between
    other = step.run(tokens)
    assert other.loss != first.loss, "without the saved state the draws differ: dropout is on"
    again = step.repeat(tokens)
    assert again == first
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected), "repeat starts from no gradient"
    assert torch.equal(torch.get_rng_state(), after)


def test_every_random_state_is_restored_exactly() -> None:
    def draw() -> list[float]:
        return [random.random(), float(numpy.random.random()), float(torch.rand(()))]

    draw()
    state = random_state.capture(CPU)
    first = draw()
    assert draw() != first
    random_state.restore(state, CPU)
    assert draw() == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_rows(
    tuned: Callable[..., Any], rows: Callable[..., list[Example]], value: float
) -> None:
    model = tuned(bits=4).model.train()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj.lora_B" in name)[0, 0] = value
    with pytest.raises(TrainingError, match=r"the loss is nan.*made\.jsonl:1, made\.jsonl:2") as caught:
        Step(model, rows((5, 9)), pad_id=2, device=CPU).run(1)
    assert "peftkit data preview" in str(caught.value)


def test_contract_sdpa_on_a_cpu_swallows_nan() -> None:
    """A NaN in queries or keys gives zeros, not NaN: the loss alone cannot say that all numbers are sound."""
    query, key, value = torch.randn(3, 1, 2, 5, 32)
    query[..., 0] = float("nan")
    assert not torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).isnan().any()


def test_a_step_without_answers_is_refused(rows: Callable[..., list[Example]]) -> None:
    for labelled in ((), (0,)):  # the first token of a row is never predicted
        with pytest.raises(TrainingError, match="no answer token"):
            Step(Certain(), rows((5, 9), labelled=labelled), pad_id=2, device=CPU)


def test_backward_is_the_callers(rows: Callable[..., list[Example]]) -> None:
    seen: list[float] = []
    model = Certain()
    Step(model, certain_rows(), pad_id=0, device=CPU, backward=lambda loss: seen.append(loss.item())).run(1)
    assert sum(seen) == pytest.approx(1.0625, abs=1e-6)
    assert model.shift.grad is None
