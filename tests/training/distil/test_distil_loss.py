"""The loss of distillation against its formula in float64, its gradient's closed form, and TRL's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftkit.data.chat import IGNORED
from peftkit.training.distil import loss as distil_loss
from peftkit.training.distil.loss import Scored, divergence, summed, tempered_kl
from peftkit.training.passes import head as heads
from peftkit.training.passes.head import Head

LABELS, TOKENS, WIDTH = 23, 40, 16


def said(seed: int, tokens: int = TOKENS, *, chunked: bool = True, width: int = WIDTH) -> Scored:
    """A model's states and head in float64, with large logits; the same targets for every seed."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, tokens, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.randn(tokens, width, generator=draw, dtype=torch.float64))
    states = torch.randn(LABELS, width, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, TOKENS, (LABELS,), generator=torch.Generator().manual_seed(99))
    if not chunked:
        return Scored(layer(states).requires_grad_(), targets, None)
    return Scored(states.requires_grad_(), targets, Head(layer, tokens))


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    moved = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(moved - np.log(np.exp(moved).sum(axis=-1, keepdims=True)))


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.exp(log_softmax(logits)))


def logits_of(scored: Scored) -> np.ndarray[Any, Any]:
    return scored.logits(scored.states).detach().numpy()


def test_the_loss_by_hand() -> None:
    """Student (½, ½), teacher (¾, ¼), T = 1: KL = ¾ ln 3/2 + ¼ ln ½ = 0.130812; CE = ln 2."""
    student = Scored(torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0]), None)
    teacher = Scored(torch.tensor([[0.75, 0.25]], dtype=torch.float64).log(), torch.tensor([0]), None)
    loss, nll = summed(student, teacher, 1.0, 0.25)
    assert float(loss.detach()) == pytest.approx(0.75 * math.log(2) + 0.25 * 0.130812, abs=1e-6)
    assert float(nll) == pytest.approx(math.log(2))
    loss.backward()
    assert student.states.grad is not None
    expected = [0.75 * (0.5 - 1) + 0.25 * (0.5 - 0.75), 0.75 * 0.5 + 0.25 * (0.5 - 0.25)]
    assert student.states.grad[0].tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.3, 30), st.floats(0, 1), st.integers(0, 3))
def test_loss_and_gradient_are_the_formula(temperature: float, weight: float, seed: int) -> None:
    """(1 - w) · (softmax(z_s) - onehot) + w · T · (softmax(z_s / T) - softmax(z_t / T)), an independent numpy."""
    student, teacher = said(seed, chunked=False), said(seed + 10, chunked=False)
    loss, nll = summed(student, teacher, temperature, weight)
    loss.backward()
    ours, theirs, targets = logits_of(student), logits_of(teacher), student.targets.numpy()
    onehot = np.eye(TOKENS)[targets]
    ce = -(log_softmax(ours) * onehot).sum()
    log_p, log_q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    expected = (1 - weight) * ce + weight * temperature**2 * (p * (log_p - log_q)).sum()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
    assert float(nll) == pytest.approx(ce, rel=1e-12)
    assert student.states.grad is not None
    slope = (1 - weight) * (softmax(ours) - onehot) + weight * temperature * (q - p)
    np.testing.assert_allclose(student.states.grad.numpy(), slope, rtol=0, atol=1e-11)


def test_the_gradient_nears_the_difference_of_centred_logits_when_the_temperature_grows() -> None:
    student, teacher = said(0, chunked=False), said(1, chunked=False)
    apart = []
    for temperature in (1e3, 1e4):
        student.states.grad = None
        summed(student, teacher, temperature, 1.0)[0].backward()
        ours, theirs = (logits - logits.mean(axis=1, keepdims=True) for logits in map(logits_of, (student, teacher)))
        assert student.states.grad is not None
        apart.append(float(np.abs(student.states.grad.numpy() - (ours - theirs) / TOKENS).max()))
    assert apart[0] < 0.05
    assert apart[1] == pytest.approx(apart[0] / 10, rel=0.05)  # the error is of the first order in 1 / T


@pytest.mark.parametrize("rows", [1, 7, LABELS, 1000])
@pytest.mark.parametrize("wider", [False, True])
def test_chunks_change_neither_loss_nor_gradient(rows: int, wider: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LOGITS_BYTES", rows * 4 * TOKENS)
    student, teacher = said(0), said(1, width=3 * WIDTH if wider else WIDTH)
    assert len(distil_loss._chunks(student, teacher)) == -(-LABELS // rows)
    loss, nll = summed(student, teacher, 2.0, 0.6)
    loss.backward()
    plain = student.states.detach().clone().requires_grad_()
    assert student.head is not None
    logits, theirs = student.head.logits(plain), teacher.logits(teacher.states).detach()
    ce = nn.functional.cross_entropy(logits, student.targets, reduction="sum")
    expected = 0.4 * ce + 0.6 * 4 * tempered_kl(logits, theirs, 2.0).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(nll, ce.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(student.states.grad, plain.grad, rtol=1e-11, atol=1e-13)
    assert teacher.states.grad is None


def test_no_more_than_a_chunk_has_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LOGITS_BYTES", 5 * 4 * TOKENS)
    seen: list[int] = []
    student, teacher = said(0), said(1)
    for each in (student, teacher):
        assert each.head is not None
        each.head.module.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    summed(student, teacher, 2.0, 0.5)[0].backward()
    assert max(seen) == 5
    assert sum(seen) == 4 * LABELS  # twice each: the backward pass makes them again


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_trls_forward_divergence_times_the_squared_temperature(temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = said(0, chunked=False), said(1, chunked=False)
    loss, _ = summed(student, teacher, temperature, 1.0)
    labels = student.targets[None].clone()
    expected = GKDTrainer.generalized_jsd_loss(
        student.states[None].detach(), teacher.states[None].detach(), labels, beta=0, temperature=temperature,
        num_items_in_batch=1,
    )  # fmt: skip
    assert float(loss.detach()) == pytest.approx(temperature**2 * float(expected), rel=1e-12)


def test_where_a_vocabulary_is_padded_the_tokens_of_both_count() -> None:
    logits = torch.randn(4, 30, dtype=torch.float64)
    padded = torch.cat([logits, torch.full((4, 8), 5.0, dtype=torch.float64)], dim=1)
    other = torch.randn(4, 30, dtype=torch.float64)
    expected = tempered_kl(logits, other, 2.0)
    assert torch.equal(tempered_kl(padded, other, 2.0), expected)
    assert torch.equal(tempered_kl(other, padded, 2.0), tempered_kl(other, logits, 2.0))


def test_divergence_is_zero_from_itself_and_above_zero_from_others() -> None:
    assert divergence(said(0), said(0)) == pytest.approx(0, abs=1e-12)
    expected = float(tempered_kl(*(said(n).logits(said(n).states).detach() for n in (0, 1)), 1.0).sum())
    assert divergence(said(0), said(1)) == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_labels_has_a_loss_of_zero_with_a_gradient() -> None:
    states = torch.zeros(0, WIDTH, requires_grad=True)
    empty = Scored(states, torch.zeros(0, dtype=torch.long), said(0).head)
    loss, nll = summed(empty, empty, 2.0, 0.5)
    loss.backward()
    assert (float(loss.detach()), float(nll)) == (0.0, 0.0)
    assert states.grad is not None
    assert IGNORED < 0
