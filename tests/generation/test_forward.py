"""Token likelihoods against float64 arithmetic written out, and against themselves: alone, batched, padded.

Models here are float64, so the only rounding is that of the logits to float32 before the softmax: half an ulp at
|logit| < 8 is 2⁻²², and the sums of `cross_entropy` stay within a few more. TOLERANCE allows 16 of these.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bases import write_base
from transformers import AutoModelForCausalLM

from peftkit.generation.forward import autocast, by_length, pad, row_nll, token_nll

TOLERANCE = 16 * 2**-22
CPU = torch.device("cpu")
EOS = 2


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny float64 model whose predictions depend on the whole context."""
    folder = write_base(tmp_path_factory.mktemp("lively"), seed=3, initializer_range=0.2, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64).eval()


def some_rows(lengths: list[int], seed: int = 0) -> list[Row]:
    """Rows with eos (which is pad too) inside, at the start and at the end; about half of the labels count."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 259, (length,), generator=random).tolist()
        ids[0], ids[length // 2], ids[-1] = EOS, EOS, EOS
        learned = torch.rand(length, generator=random) < 0.5
        learned[-1] = True
        rows.append(Row(ids, [i if keep else -100 for i, keep in zip(ids, learned, strict=True)]))
    return rows


ROWS = some_rows([5, 23, 2, 11, 40, 11])


def reference(model: Any, row: Row) -> list[float]:
    """-log softmax of every label, one row, no padding, no mask, all positions; 0 where there is no label."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    values = []
    for position, label in enumerate(row.labels[1:]):
        if label == -100:
            values.append(0.0)
            continue
        scores = logits[position].double()
        highest = scores.max()
        values.append(float(highest + torch.log(torch.exp(scores - highest).sum()) - scores[label]))
    return values


def test_every_label_gets_the_likelihood_that_the_tokens_before_it_give(model: Any) -> None:
    for row in ROWS:
        got = token_nll(model, pad([row], EOS, CPU))
        assert got.dtype == next(model.parameters()).dtype  # float32, or float64 where the model is
        assert got.shape == (1, len(row.input_ids) - 1)
        assert got[0].tolist() == pytest.approx(reference(model, row), abs=TOLERANCE)


def test_neighbours_and_padding_with_eos_change_no_row(model: Any) -> None:
    got = token_nll(model, pad(ROWS, EOS, CPU))
    for row, values in zip(ROWS, got, strict=True):
        length = len(row.input_ids) - 1
        assert values[:length].tolist() == pytest.approx(reference(model, row), abs=TOLERANCE)
        assert not values[length:].any()


def test_what_stands_in_the_padding_does_not_matter(model: Any) -> None:
    assert torch.equal(token_nll(model, pad(ROWS, EOS, CPU)), token_nll(model, pad(ROWS, 77, CPU)))


def test_padding_is_on_the_right_and_masked_and_never_a_label() -> None:
    batch = pad([Row([5, EOS], [-100, EOS]), Row([7], [7])], EOS, CPU)
    assert batch["input_ids"].tolist() == [[5, EOS], [7, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, EOS], [7, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_mask_less_forward_would_be_noticed(model: Any) -> None:
    """Negative control: moving the context by one token moves the likelihoods by far more than the tolerance."""
    row = ROWS[1]
    shifted = Row([9, *row.input_ids[1:]], row.labels)
    differences = [abs(a - b) for a, b in zip(reference(model, row), reference(model, shifted), strict=True)]
    assert max(differences) > 1000 * TOLERANCE


class AllLogits(torch.nn.Module):
    """A model whose forward cannot leave logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class Spy(AllLogits):
    """A model that notes which positions' logits were asked for."""

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, logits_to_keep: Any = 0) -> Any:
        self.kept = logits_to_keep
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, logits_to_keep=logits_to_keep
        )


def test_logits_that_are_left_out_change_nothing(model: Any) -> None:
    batch = pad(ROWS, EOS, CPU)
    torch.testing.assert_close(token_nll(AllLogits(model), batch), token_nll(model, batch), rtol=0, atol=TOLERANCE)


def test_the_head_is_computed_only_where_some_row_has_a_label(model: Any) -> None:
    rows = [Row([1, 5, 6, 7, 8], [-100, -100, -100, 7, -100]), Row([1, 5, 6], [-100, -100, 6])]
    spy = Spy(model)
    got = token_nll(spy, pad(rows, EOS, CPU))
    assert spy.kept.tolist() == [1, 2]
    assert [got[0].nonzero().flatten().tolist(), got[1].nonzero().flatten().tolist()] == [[2], [1]]


def test_a_peft_model_takes_the_short_path_too(model: Any) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def get_base_model(self) -> Any:
            return self.inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    spy = Spy(model)
    token_nll(Wrapped(spy), pad(ROWS[:1], EOS, CPU))
    assert isinstance(spy.kept, torch.Tensor)


def test_a_batch_without_labels_costs_no_forward_and_counts_nothing() -> None:
    got = token_nll(None, pad([Row([1, 2, 3], [-100] * 3), Row([4], [4])], EOS, CPU))
    assert got.tolist() == [[0.0, 0.0], [0.0, 0.0]]  # the first token of a row is never predicted


def test_gradients_flow_as_through_the_written_out_loss(model: Any) -> None:
    weight = model.model.embed_tokens.weight
    row = ROWS[3]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss.double(), weight)[0]

    ours = gradient(token_nll(model, pad([row], EOS, CPU)).sum())
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
    labels = torch.tensor(row.labels[1:])
    picked = torch.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    theirs = gradient(-picked[labels != -100].sum())
    assert theirs.abs().max() > 0
    # softmax and its gradient are in float32 here: 2⁻²³ per term, a few terms
    assert float((ours - theirs).norm() / theirs.norm()) < 16 * 2**-23


def test_sums_come_back_in_the_order_of_the_rows_whatever_the_batches(model: Any) -> None:
    expected = [math.fsum(reference(model, row)) for row in ROWS]
    assert len({round(value, 3) for value in expected}) == len(ROWS)
    for size in (1, 2, 4, 100):
        got = row_nll(model, ROWS, pad_id=EOS, device=CPU, batch_size=size)
        assert got == pytest.approx(expected, abs=40 * TOLERANCE)
    backwards = row_nll(model, ROWS[::-1], pad_id=EOS, device=CPU, batch_size=2)
    assert backwards == pytest.approx(expected[::-1], abs=40 * TOLERANCE)
    assert row_nll(model, [], pad_id=EOS, device=CPU) == []


@given(st.lists(st.integers(1, 30)), st.integers(1, 8))
def test_batches_are_a_permutation_with_the_least_padding(lengths: list[int], size: int) -> None:
    batches = by_length([Row([0] * length, []) for length in lengths], size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


def test_autocast_is_for_16_bit_only() -> None:
    x = torch.randn(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch would warn about float32, and so would every evaluation
        context = autocast(CPU, torch.float32)
    with context:
        assert (x @ x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
