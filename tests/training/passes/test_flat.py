"""Rows laid flat: each sees itself alone, begins at position 0, and has no label taken from the row before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from training.passes.lab import CPU, SETTINGS, SHAPE, VOCABULARY, apart, gradients, tiny, turns
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftkit.data.chat import IGNORED, Example
from peftkit.training.passes.flat import BY_ROW, attention_by_row, by_row, lay_flat, longest_flat

LENGTHS = (5, 1, 11, 8)
CLOSE = 1e-4
"""Logits are a few units large and go through a dozen float32 products."""
LEAK = 0.1
"""Attending to another row moves the logits of these models by units."""


def alone(model: Any, rows: Sequence[Example]) -> list[torch.Tensor]:
    """The logits of each row on its own."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0] for row in rows]


def moved(model: Any, rows: Sequence[Example], **inputs: Any) -> float:
    """How far the logits of rows laid flat are from those of the rows alone."""
    with torch.no_grad():
        found = model(**inputs).logits[0].split([len(row.input_ids) for row in rows])
    return max(float((one - right).abs().max()) for one, right in zip(found, alone(model, rows), strict=True))


def flat_inputs(rows: Sequence[Example]) -> dict[str, Any]:
    return {name: value for name, value in lay_flat(rows, CPU).items() if name != "labels"}


def test_what_the_model_is_called_with() -> None:
    rows = [
        Example([10, 11, 12], [10, IGNORED, 12], 1, 0, "a"),
        Example([20], [20], 0, 1, "b"),
        Example([30, 31], [IGNORED, 31], 1, 2, "c"),
    ]
    batch = lay_flat(rows, CPU)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 30, 31]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 12, IGNORED, IGNORED, 31]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert "attention_mask" not in batch, "a mask of ones would let rows see one another"
    assert batch["cu_seq_lens_q"].dtype == torch.int32, "what flash attention takes"
    assert {batch[name].dtype for name in ("input_ids", "position_ids", "labels")} == {torch.int64}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_upstream_attends_across_rows_without_a_word(name: str, kernel: str) -> None:
    """Why `lay_flat` gives no mask, and the passes no cache: each of the two lets rows see those before them."""
    model, rows = tiny(name), turns(LENGTHS)
    model.set_attn_implementation(kernel)
    bare = {key: flat_inputs(rows)[key] for key in ("input_ids", "position_ids")}
    ones = torch.ones_like(bare["input_ids"])
    assert moved(model, rows, **bare) > LEAK, "use_cache at its default"
    assert moved(model, rows, **bare, use_cache=False, attention_mask=ones) > LEAK, "a mask of ones"
    assert moved(model, rows, **bare, use_cache=False) < CLOSE
    one_row = {**bare, "position_ids": torch.arange(sum(LENGTHS))[None]}
    assert moved(model, rows, **one_row, use_cache=False) > LEAK, "positions that go on"
    with attention_by_row(model):
        assert model.config._attn_implementation == (BY_ROW if kernel == "sdpa" else kernel)
        assert moved_flat(model, rows) < CLOSE


def moved_flat(model: Any, rows: Sequence[Example]) -> float:
    """As `moved`, with the rows alone computed by the kernel that was there before."""
    with torch.no_grad():
        found = model(**flat_inputs(rows), use_cache=False).logits[0].split([len(row.input_ids) for row in rows])
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager" if kernel == "eager" else "sdpa")
    expected = alone(model, rows)
    model.set_attn_implementation(kernel)
    return max(float((one - right).abs().max()) for one, right in zip(found, expected, strict=True))


def attended(query: Any, key: Any, value: Any, scaling: float) -> torch.Tensor:
    """Causal attention of one row from its definition, (heads, tokens, width) each, keys shared by groups of heads."""
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = query @ key.transpose(1, 2) * scaling
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return ((weights / weights.sum(-1, keepdim=True)) @ value).transpose(0, 1)


@pytest.mark.parametrize("lengths", [(5, 1, 4), (7,), (1, 1, 1)])
def test_attention_by_row_is_its_definition(lengths: tuple[int, ...]) -> None:
    total, scaling = sum(lengths), 0.37
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    found, weights = by_row(module, query, key, value, None, cu_seq_lens_q=starts, scaling=scaling, dropout=0.0)  # type: ignore[arg-type]
    assert weights is None
    pieces = [part[0].split(list(lengths), dim=1) for part in (query, key, value)]
    wanted = torch.cat([attended(q, k, v, scaling) for q, k, v in zip(*pieces, strict=True)])[None]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    pull = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    slopes, right = (torch.autograd.grad(out, (query, key, value), pull) for out in (found, wanted))
    torch.testing.assert_close(slopes, right, rtol=1e-11, atol=1e-12)


def test_what_attention_by_row_cannot_do_is_an_error() -> None:
    states = torch.zeros(1, 2, 6, 8)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    call: Callable[..., Any] = lambda mask=None, **options: by_row(module, states, states, states, mask, **options)  # type: ignore[arg-type]  # noqa: E731
    starts = torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="where rows begin"):
        call()
    with pytest.raises(ValueError, match="rows of 4 tokens with a mask or a window of 3"):
        call(cu_seq_lens_q=starts, sliding_window=3)
    with pytest.raises(ValueError, match="rows of 4 tokens with a mask"):
        call(torch.ones(1, 1, 6, 6), cu_seq_lens_q=starts)
    assert call(cu_seq_lens_q=starts, sliding_window=4)[0].shape == (1, 6, 2, 8)


def test_the_kernel_is_restored_after_an_error_and_others_are_left_alone() -> None:
    model = tiny("LlamaForCausalLM")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="stop"), attention_by_row(model):
        assert model.config._attn_implementation == BY_ROW
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert moved(model, turns((4, 6))[:1], input_ids=torch.tensor([turns((4, 6))[0].input_ids])) < CLOSE
    model.set_attn_implementation("eager")
    with attention_by_row(model):
        assert model.config._attn_implementation == "eager"


def test_only_our_own_name_is_added_to_transformers() -> None:
    assert ALL_ATTENTION_FUNCTIONS[BY_ROW] is by_row
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not by_row


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_loss_and_gradients_are_those_of_upstream_row_by_row(name: str) -> None:
    """Σ of `model(labels=)` over rows."""
    model, rows = tiny(name, dtype=torch.float64), turns((5, 9, 2, 7))
    nll = 0.0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        count = int((labels[:, 1:] != IGNORED).sum())
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss * count
        loss.backward()
        nll += float(loss.detach())
    wanted = gradients(model)
    batch = lay_flat(rows, CPU)
    labels = batch.pop("labels")
    with attention_by_row(model):
        logits = model(**batch, use_cache=False).logits
        found = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum")
        found.backward()
    assert float(found.detach()) == pytest.approx(nll, rel=1e-7), "upstream's loss is float32"
    assert apart(gradients(model), wanted) < 1e-6
    kept = torch.tensor([label for row in rows for label in row.labels])
    assert (kept != IGNORED).sum() > (labels != IGNORED).sum(), "some rows begin with a label"
    with_first = torch.nn.functional.cross_entropy(logits[0, :-1], kept[1:], ignore_index=IGNORED, reduction="sum")
    assert float(with_first.detach()) > nll + 1, "the first label of a row, scored from the row before it"


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("LlamaForCausalLM", {}, None),
        ("MistralForCausalLM", {"sliding_window": 7}, 7),
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("Gemma2ForCausalLM", {}, 8),
        ("GPTNeoForCausalLM", {}, 6),
        ("Llama4ForCausalLM", {"attention_chunk_size": 12}, 12),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 9}, None),
    ],
)
def test_windows_limit_the_rows_that_lie_flat(name: str, changes: dict[str, Any], wanted: int | None) -> None:
    config = getattr(transformers, name).config_class(**{**SETTINGS.get(name, SHAPE), **changes})
    model = SimpleNamespace(config=config)
    assert longest_flat(model) == wanted
    assert config.vocab_size == VOCABULARY


def test_a_window_shorter_than_a_row_changes_its_states() -> None:
    """Why the limit is there: by row, a kernel knows no window, and refuses the rows that one would cut."""
    rows = turns((6, 9))
    model = tiny("MistralForCausalLM", sliding_window=7)
    with attention_by_row(model):
        assert moved_flat(model, turns((6, 5, 7))) < CLOSE
        with pytest.raises(ValueError, match="rows of 9 tokens with a mask or a window of 7"):
            model(**flat_inputs(rows), use_cache=False)
    unlimited = tiny("MistralForCausalLM", sliding_window=None)
    windowed, whole = alone(model, rows), alone(unlimited, rows)
    assert float((windowed[0] - whole[0]).abs().max()) < CLOSE
    assert float((windowed[1] - whole[1]).abs().max()) > LEAK, "the window cuts the longer row"
