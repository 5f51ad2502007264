"""Tokens are chosen as transformers' warpers would, by each request's own random numbers, whoever stands beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from peftkit.generation.choose import UNDECIDED, Chooser, choose_all, kept_weights, logprobs
from peftkit.generation.requests import Sampling

DRAWN = Sampling(temperature=0.8, top_p=0.9, top_k=20, seed=7)


def logits_of(seed: int, rows: int, vocab: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def by_transformers(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after transformers' warpers, in their order; (vocab,) float64."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    scores = logits.double().unsqueeze(0)
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return torch.softmax(scores[0], dim=-1)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([1, 2, 17, 600, 9000]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.05, 5),
        top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
        top_k=st.one_of(st.just(0), st.integers(1, 700)),
    ),
)
def test_kept_tokens_and_their_probabilities_are_those_of_transformers(
    seed: int, vocab: int, spread: float, sampling: Sampling
) -> None:
    logits = logits_of(seed, 1, vocab, spread)[0].double()
    weights = kept_weights(logits, sampling)
    assert weights is not None
    expected = by_transformers(logits, sampling)
    assert torch.equal(weights > 0, expected > 0)
    torch.testing.assert_close(weights / weights.sum(), expected, rtol=1e-9, atol=1e-15)


def test_the_token_that_crosses_top_p_is_kept_and_the_next_is_not() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = {
        top_p: kept_weights(logits, Sampling(1.0, top_p=top_p)).count_nonzero().item()  # type: ignore[union-attr]
        for top_p in (0.01, 0.49, 0.51, 0.79, 0.81, 0.96, 1.0)
    }
    assert kept == {0.01: 1, 0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.96: 4, 1.0: 4}


def test_of_equals_top_k_keeps_all_and_top_p_the_lower_ids() -> None:
    level = torch.zeros(1000)
    for sampling, kept in ((Sampling(1.0, top_k=3), 1000), (Sampling(1.0, top_p=0.25), 250)):
        weights = kept_weights(level, sampling)
        assert weights is not None
        assert weights.nonzero()[:, 0].tolist() == list(range(kept))


def test_draws_follow_the_probabilities() -> None:
    logits = logits_of(3, 1, 12, 1.0)[0]
    sampling = Sampling(temperature=0.7, top_p=0.95, top_k=9, seed=1)
    chooser, expected, count = Chooser(sampling), by_transformers(logits, sampling), 20_000
    counts = torch.bincount(torch.tensor([chooser.draw(logits) for _ in range(count)]), minlength=12)
    kept = expected > 0
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept], expected[kept] * count).pvalue > 1e-4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_answer_depends_on_its_seed_and_on_nothing_beside_it(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    steps = [logits_of(step, 4, 300) for step in range(30)]
    alone = [Chooser(DRAWN)] * 1
    expected = [alone[0].choose(logits[2]) for logits in steps]
    assert len(set(expected)) > 5
    beside = [Chooser(Sampling()), Chooser(Sampling(1.0, seed=3)), Chooser(DRAWN), Chooser(DRAWN)]
    torch.manual_seed(99)
    found = []
    for step, logits in enumerate(steps):
        # Neighbours come and go.
        rows = [2] if step % 3 == 0 else [0, 2] if step % 3 == 1 else [0, 1, 2]
        found.append(choose_all(logits[rows].to(device), [beside[row] for row in rows])[-1])
        torch.rand(3)
    assert found == expected
    assert [Chooser(Sampling(2.0, seed=seed)).choose(steps[0][0]) for seed in range(20)] != [expected[0]] * 20


def test_greedy_rows_are_the_argmax_of_the_whole_batch_at_once() -> None:
    logits = logits_of(5, 8, 1000)
    logits[3, 10] = logits[3, 700] = 99.0
    kept = logits.clone()
    assert choose_all(logits, [Chooser(Sampling())] * 8) == logits.argmax(dim=-1).tolist()
    assert torch.equal(logits, kept)
    mixed = [Chooser(DRAWN if row % 2 else Sampling()) for row in range(8)]
    assert choose_all(logits.to(torch.bfloat16), mixed)[::2] == logits.to(torch.bfloat16).argmax(-1).tolist()[::2]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 60), temperature=st.sampled_from([0.0, 1.0, 10.0]))
def test_a_mask_forbids_in_its_own_row_only_and_all_that_lies_beyond_it(
    seed: int, width: int, temperature: float
) -> None:
    logits = logits_of(seed, 3, 50)
    before = logits.clone()
    mask = torch.rand(width, generator=torch.Generator().manual_seed(seed)) < 0.3
    allowed = set(mask[:50].nonzero()[:, 0].tolist())
    choosers = [Chooser(Sampling(temperature, seed=seed)) for _ in range(3)]
    first, masked, last = choose_all(logits, choosers, [None, mask, None])
    assert masked in allowed if allowed else masked == UNDECIDED
    free = [Chooser(Sampling(temperature, seed=seed)).choose(logits[row]) for row in (0, 2)]
    assert [first, last] == free
    assert torch.equal(logits, before)
    if temperature == 0 and allowed:
        assert masked == max(allowed, key=lambda token: float(logits[1, token]))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_a_row_of_broken_logits_chooses_nothing_and_leaves_the_others_alone(broken: float, sampling: Sampling) -> None:
    logits = logits_of(1, 3, 40)
    expected = choose_all(logits, [Chooser(sampling) for _ in range(3)])
    if math.isinf(broken) and broken < 0:
        logits[1] = broken
    else:
        logits[1, 5] = broken
    assert choose_all(logits, [Chooser(sampling) for _ in range(3)]) == [expected[0], UNDECIDED, expected[2]]


def test_tiny_temperatures_choose_the_likeliest_and_forbidden_tokens_are_never_drawn() -> None:
    logits = logits_of(2, 1, 100)[0]
    logits[40:] = -math.inf
    for temperature in (5e-324, 1e-300, 1e-6):
        assert Chooser(Sampling(temperature, top_p=0.9)).choose(logits) == int(logits.argmax())
    hot = Chooser(Sampling(1e300, seed=4))
    assert {hot.choose(logits) for _ in range(600)} == set(range(40))


def test_log_probabilities_are_of_raw_logits_in_float32() -> None:
    logits = logits_of(8, 1, 500)[0].to(torch.bfloat16)
    expected = torch.log_softmax(logits.double(), dim=-1)
    found = logprobs(logits, 17, 5)
    assert found.token == 17
    assert found.value == pytest.approx(float(expected[17]), abs=1e-5)
    assert [value for _, value in found.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)
    assert [expected[token].item() for token, _ in found.top] == expected.topk(5).values.tolist()
    assert logprobs(logits, 17, 0).top == ()
    assert sum(math.exp(value) for _, value in logprobs(logits, 0, 500).top) == pytest.approx(1, abs=1e-5)
