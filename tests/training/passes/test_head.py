"""The head at labelled positions: the loss and slopes of a full softmax, and never more than C rows of logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.passes.lab import CPU, VOCABULARY, adapted, apart, gradients, tiny, turns

from peftkit.data.chat import IGNORED, Example
from peftkit.generation.forward import pad
from peftkit.training.objective import Objective
from peftkit.training.passes import head as head_module
from peftkit.training.passes.head import LOGITS_BYTES, Head, states_at_labels, summed_loss
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.trying import find_paths
from peftkit.training.regularize.losses import TokenLoss
from peftkit.training.step import Step

WIDTH, LABELS, C = 6, 11, 4
"""11 labels in chunks of 4: the last one is not full."""


class Watched(nn.Linear):  # type: ignore[misc]
    """A head that is not known to be plain: its slope is autograd's."""


@contextmanager
def rows_at_once(patch: pytest.MonkeyPatch, rows: int) -> Iterator[None]:
    """Lower the limit on logits so that C is `rows`."""
    with patch.context() as inside:
        inside.setattr(head_module, "LOGITS_BYTES", 4 * VOCABULARY * rows)
        assert Head(nn.Identity(), VOCABULARY).rows == rows
        yield


def by_hand(
    states: Any, targets: Any, weight: Any, bias: Any, scale: float, cap: float | None, epsilon: float
) -> tuple[float, float, Any, Any, Any]:
    """Loss, NLL and the slopes by states, weight and bias in float64, label by label, from their definitions."""
    loss = nll = 0.0
    by_states, by_weight, by_bias = numpy.zeros_like(states), numpy.zeros_like(weight), numpy.zeros(len(weight))
    for at, (state, target) in enumerate(zip(states, targets, strict=True)):
        scaled = scale * (weight @ state + bias)
        logits = scaled if cap is None else cap * numpy.tanh(scaled / cap)
        chances = numpy.exp(logits - logits.max())
        chances /= chances.sum()
        wanted = numpy.full(len(weight), epsilon / len(weight))
        wanted[target] += 1 - epsilon
        loss -= float(wanted @ numpy.log(chances))
        nll -= float(numpy.log(chances[target]))
        slope = (chances - wanted) * scale * (1.0 if cap is None else 1 - (logits / cap) ** 2)
        by_states[at] = slope @ weight
        by_weight += numpy.outer(slope, state)
        by_bias += slope
    return loss, nll, by_states, by_weight, by_bias


def made(kind: type[nn.Linear], bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    """A head whose every parameter trains, states that need a slope, and targets."""
    torch.manual_seed(0)
    head = kind(WIDTH, VOCABULARY, bias=bias).to(dtype)
    states = (3 * torch.randn(LABELS, WIDTH)).to(dtype).requires_grad_()
    return head, states, torch.randint(0, VOCABULARY, (LABELS,))


CASES = [
    (kind, bias, scale, cap, epsilon)
    for kind in (nn.Linear, Watched)
    for bias, scale, cap, epsilon in [
        (False, 1.0, None, 0.0),
        (True, 1.0, None, 0.1),
        (False, 0.125, None, 0.3),
        (False, 1.0, 2.0, 0.0),
        (True, 3.0, 2.0, 0.2),
    ]
]


@pytest.mark.parametrize(("kind", "bias", "scale", "cap", "epsilon"), CASES)
def test_loss_and_slopes_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, kind: Any, bias: bool, scale: float, cap: float | None, epsilon: float
) -> None:
    module, states, targets = made(kind, bias)
    head = Head(module, VOCABULARY, scale, cap)
    assert head.closed_form is (kind is nn.Linear)
    given, wanted_tokens, weight = (value.detach().numpy() for value in (states, targets, module.weight))
    added = module.bias.detach().numpy() if bias else numpy.zeros(VOCABULARY)
    loss, nll, by_states, by_weight, by_bias = by_hand(given, wanted_tokens, weight, added, scale, cap, epsilon)
    for rows in (1, C, LABELS, 100):
        with rows_at_once(monkeypatch, rows):
            found, found_nll = summed_loss(head, states, targets, epsilon)
            assert float(found.detach()) == pytest.approx(loss, rel=1e-12)
            assert float(found_nll) == pytest.approx(nll, rel=1e-12)
            assert not found_nll.requires_grad
            wanted = [by_states, by_weight, *([by_bias] if bias else [])]
            slopes = torch.autograd.grad(2.5 * found, [states, *module.parameters()])
            for slope, right in zip(slopes, wanted, strict=True):
                numpy.testing.assert_allclose(slope.numpy(), 2.5 * right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Linear, Watched])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    module, states, targets = made(kind, True)
    module = kind(WIDTH, 17).double()
    with monkeypatch.context() as patch:
        patch.setattr(head_module, "LOGITS_BYTES", 4 * 17 * C)
        head = Head(module, 17, 0.7, 1.5)

        def loss(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            module.__dict__ |= {"weight": weight, "bias": bias}
            return summed_loss(head, states, targets % 17, 0.2)[0]

        inputs = (states, *(parameter.detach().requires_grad_() for parameter in module.parameters()))
        module._parameters.clear()  # they are given as inputs
        assert torch.autograd.gradcheck(loss, inputs, nondet_tol=0.0)


def test_frozen_parameters_get_no_gradient() -> None:
    module, states, targets = made(nn.Linear, True, torch.float32)
    module.requires_grad_(False)
    summed_loss(Head(module, VOCABULARY), states, targets)[0].backward()
    assert states.grad is not None
    assert module.weight.grad is module.bias.grad is None


class Logits(TorchDispatchMode):  # type: ignore[misc]
    """The most rows of logits in any tensor that an operation makes; the weight's own shape is not counted."""

    def __init__(self, *weights: torch.Size) -> None:
        super().__init__()
        self.most, self.calls, self.weights = 0, 0, {*weights, *(torch.Size(reversed(shape)) for shape in weights)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and VOCABULARY in value.shape and value.shape not in self.weights:
                self.calls += 1
                self.most = max(self.most, value.numel() // VOCABULARY)
        return out


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("LlamaForCausalLM", {}, {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, {}),
    "biased": ("PhiForCausalLM", {}, {}),
    "soft-capped": ("Gemma2ForCausalLM", {}, {}),
    "scaled": ("CohereForCausalLM", {}, {}),
    "LoRA on the head": ("LlamaForCausalLM", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "trained head": ("LlamaForCausalLM", {}, {"modules_to_save": ["lm_head"]}),
    "bfloat16": ("LlamaForCausalLM", {"dtype": torch.bfloat16}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_more_than_c_rows_of_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Forward and backward pass of a step with 60 labels; the plain way has as many rows as the batch has columns."""
    kind, changes, lora = MODELS[name]
    tuned = adapted(tiny(kind, **changes), **lora)
    paths = find_paths(tuned)
    assert paths.head is not None, paths.reasons
    assert paths.head.closed_form is (name not in ("LoRA on the head", "trained head"))
    tuned.model.train()
    rows = turns((30, 41, 29, 20))
    found: dict[str, Any] = {}
    for way, chosen in (("plain", Paths()), ("quick", paths)):
        step = Step(tuned.model, rows, pad_id=2, device=CPU, paths=chosen)
        with rows_at_once(monkeypatch, C), Logits(paths.head.module.weight.shape) as mode:
            loss = step.run(1000).loss
        found[way] = mode.most, loss, gradients(tuned.model)
        assert mode.calls
    assert step.answer_tokens > 50
    assert found["plain"][0] > 100
    assert found["quick"][0] == C, f"{found['quick'][0]} rows of logits in one tensor"
    within = 2e-2 if name == "bfloat16" else 1e-5
    assert found["quick"][1] == pytest.approx(found["plain"][1], rel=within)
    assert apart(found["quick"][2], found["plain"][2]) < (0.1 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("kind", [nn.Linear, Watched])
def test_nothing_of_the_vocabularys_size_is_kept_for_the_backward_pass(kind: Any) -> None:
    module, states, targets = made(kind, False, torch.float32)
    module.requires_grad_(False)
    kept: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss, _ = summed_loss(Head(module, VOCABULARY), states, targets)
    assert [value for value in kept if VOCABULARY in value.shape and value.shape != module.weight.shape] == []
    assert max(value.numel() for value in kept if value.shape != module.weight.shape) == states.numel()
    loss.backward()


def test_c_is_the_one_that_is_stated() -> None:
    """64 MiB of float32: 110 rows of a vocabulary of 151,936, more of a small one, and never less than one."""
    assert LOGITS_BYTES == 64 * 1024**2
    assert [Head(nn.Identity(), size).rows for size in (151_936, 49_152, 10**9)] == [110, 341, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_close_as_its_rounding(dtype: torch.dtype) -> None:
    module, states, targets = made(nn.Linear, True, dtype)
    exact = nn.Linear(WIDTH, VOCABULARY).double()
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    right, right_nll = summed_loss(Head(exact, VOCABULARY), states.detach().double().requires_grad_(), targets)
    found, nll = summed_loss(Head(module, VOCABULARY), states, targets)
    within = 4 * torch.finfo(dtype).eps
    assert found.dtype == nll.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(right.detach()), rel=within)
    assert float(nll) == pytest.approx(float(right_nll), rel=within)
    found.backward()
    assert states.grad is not None
    assert (states.grad.dtype, module.weight.grad.dtype) == (dtype, dtype)


def test_under_autocast_the_products_are_16_bit_and_the_loss_is_not() -> None:
    module, states, targets = made(nn.Linear, False, torch.float32)
    plain = float(summed_loss(Head(module, VOCABULARY), states, targets)[0].detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = summed_loss(Head(module, VOCABULARY), states, targets)
    found.backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) != plain
    assert float(found.detach()) == pytest.approx(plain, rel=4 * torch.finfo(torch.bfloat16).eps)
    assert states.grad.dtype == torch.float32


def test_a_micro_batch_without_labels_adds_nothing() -> None:
    """Rows whose answers all lie in another micro-batch of their step: no loss, no gradient, and no error."""
    tuned = adapted(tiny("LlamaForCausalLM"))
    paths = find_paths(tuned)
    empty = Example([5, 6, 7, 8], [5, *[IGNORED] * 3], 4, 0, "no answer")
    rows = [*turns((9, 7)), empty]
    batch = pad([empty], 2, CPU)
    loss, nll = TokenLoss()(tuned.model, batch, paths)
    assert (float(loss.detach()), float(nll)) == (0.0, 0.0)
    tuned.model.train()
    found = []
    for some, chosen, tokens in [(rows[:2], Paths(), 100), (rows, paths, 10), (rows, replace(paths, flat=False), 10)]:
        result = Step(tuned.model, some, pad_id=2, device=CPU, paths=chosen, objective=Objective()).run(tokens)
        found.append((result.loss, gradients(tuned.model)))
    for loss_of, trained in found[1:]:
        assert loss_of == pytest.approx(found[0][0], rel=1e-6)
        assert apart(trained, found[0][1]) < 1e-5


def test_the_states_are_those_before_labels_alone() -> None:
    tuned = adapted(tiny("LlamaForCausalLM"))
    head = find_paths(tuned).head
    assert head is not None
    batch = pad(turns((9, 5, 7)), 2, CPU)
    labels = batch.pop("labels")
    with torch.no_grad():
        every = tuned.inner.model(**batch, use_cache=False).last_hidden_state
        wanted = torch.cat([every[row, :-1][labels[row, 1:] != IGNORED] for row in range(3)])
        for keeps_some in (True, False):
            states, targets = states_at_labels(head, tuned.model, batch, labels, keeps_some=keeps_some)
            torch.testing.assert_close(states, wanted, rtol=0, atol=1e-6)
            assert targets.tolist() == [label for row in labels.tolist() for label in row[1:] if label != IGNORED]
    assert not head.module._forward_pre_hooks, "what reads the states is gone again"
