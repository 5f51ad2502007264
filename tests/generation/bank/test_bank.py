"""Sixteen adapters and the base in one batch answer as each of them alone does through PEFT."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from bank_lab import ATTENTION, LINEAR, alone, answers, bank_of, factors_of, peft_model, products, ragged
from tiny_families import write_family

from peftkit.generation.bank.bank import Bank
from peftkit.generation.bank.layout import NO_SLOT

ABOUT_FP32 = 1e-4
SETTINGS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "use_rslora": True},
    {"r": 32, "lora_alpha": 32},
    {"r": 8, "rank_pattern": {"v_proj": 32, "down_proj": 4}},
    {"r": 8, "alpha_pattern": {"q_proj": 64, "o_proj": 2}},
    {"r": 16, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
    {"r": 4, "target_modules": ["lm_head"]},
    {"r": 6, "target_modules": [*LINEAR, "lm_head"]},
    {"r": 12, "target_modules": ["o_proj", "down_proj"]},
    {"r": 8, "target_modules": ["up_proj"]},
    {"r": 8, "target_modules": ATTENTION, "layers_to_transform": [1]},
    {"r": 16, "lora_alpha": 1},
    {"r": 24, "target_modules": ["k_proj"], "use_rslora": True},
    {"r": 7, "lora_alpha": 13},
    {"r": 32, "use_rslora": True, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]
ROWS = [3, NO_SLOT, 0, 8, 15, 7, 1, 2, NO_SLOT, 14, 4, 5, 6, 9, 10, 11, 12, 13, 3, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_family(tmp_path_factory.mktemp("base"), "llama").requires_grad_(False)


@pytest.fixture(scope="module")
def adapters(model: Any) -> list[Any]:
    return [peft_model(model, seed, **settings) for seed, settings in enumerate(SETTINGS)]


@pytest.fixture(scope="module")
def full(model: Any, adapters: list[Any]) -> Bank:
    """A bank with all adapters; tests that change it make their own."""
    return bank_of(model, adapters)


def test_each_row_of_a_ragged_batch_is_its_own_adapters(model: Any, adapters: list[Any], full: Bank) -> None:
    ids, mask, lengths = ragged(len(ROWS), 11)
    found, moved = answers(full, ROWS, ids, mask), []
    for row, (slot, length) in enumerate(zip(ROWS, lengths, strict=True)):
        prompt = ids[row, :length]
        expected = alone(model if slot == NO_SLOT else adapters[slot], prompt)
        torch.testing.assert_close(found[row, :length], expected, rtol=0, atol=ABOUT_FP32)
        assert torch.equal(found[row, length - 1].argmax(), expected[-1].argmax())
        moved.append(float((expected - alone(model, prompt)).abs().max()))
    assert min(size for size, slot in zip(moved, ROWS, strict=True) if slot != NO_SLOT) > 100 * ABOUT_FP32


def test_greedy_answers_are_those_of_each_alone(model: Any, adapters: list[Any], full: Bank) -> None:
    """Eight tokens in a batch of equally long prompts, keys and values kept: one seating for each step."""
    rows = [5, 0, NO_SLOT, 2, 14]
    ids, cache, step = torch.randint(3, 200, (len(rows), 6)), None, None
    found = ids
    for _ in range(8):
        step = found if cache is None else found[:, -1:]
        with torch.inference_mode(), full.seated(rows, step.shape[1]) as bank:
            out = bank(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found = torch.cat([found, out.logits[:, -1:].argmax(-1)], dim=1)
    for row, slot in enumerate(rows):
        tokens = ids[row]
        for _ in range(8):
            tokens = torch.cat([tokens, alone(model if slot == NO_SLOT else adapters[slot], tokens)[-1:].argmax(-1)])
        assert found[row].tolist() == tokens.tolist()


def test_requests_that_are_flattened_into_one_row(model: Any, adapters: list[Any], full: Bank) -> None:
    ids, _, lengths = ragged(len(ROWS), 11)
    prompts = [ids[row, :length] for row, length in enumerate(lengths)]
    request = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    sees = (request[:, None] == request[None]) & (position[:, None] >= position[None])
    slots = [ROWS[int(row)] for row in request]
    with torch.no_grad(), full.seated(slots, 1) as bank:
        options = {"attention_mask": sees[None, None], "position_ids": position[None], "use_cache": False}
        found = bank(input_ids=torch.cat(prompts)[None], **options).logits[0]
    for row, (slot, prompt) in enumerate(zip(ROWS, prompts, strict=True)):
        expected = alone(model if slot == NO_SLOT else adapters[slot], prompt)
        torch.testing.assert_close(found[request == row], expected, rtol=0, atol=ABOUT_FP32)


def test_the_number_of_products_does_not_depend_on_how_many_adapters(model: Any, full: Bank) -> None:
    """One for each set of layers with a common input, one for each layer: 4 and 7 in each of two blocks, 1 and 1 for
    the head."""
    ids = torch.randint(3, 200, (16, 5))
    mixed = [row % 4 for row in range(16)]
    shuffled = random.Random(0).sample(range(16), 16)
    batches = [[0] * 16, mixed, sorted(mixed), list(range(16)), shuffled, [NO_SLOT, *range(15)], [NO_SLOT] * 15 + [9]]
    counts = []
    for batch in batches:
        with products() as found:
            answers(full, batch, ids)
        counts += found
    with products() as base:
        alone(model, ids[0])
    with products() as nobody:
        answers(full, [NO_SLOT] * 16, ids)
    assert set(counts) == {base[0] + 2 * (4 + 7) + 2}
    assert nobody == base


def test_layers_that_no_adapter_changes_cost_nothing(model: Any) -> None:
    """Two for q and v with their input in common, in each of two blocks."""
    bank = bank_of(model, [peft_model(model, 0, target_modules=["q_proj", "v_proj"])])
    ids = torch.randint(3, 200, (2, 3))
    with products() as base:
        alone(model, ids[0])
    with products() as found:
        answers(bank, [0, 0], ids)
    assert found[0] == base[0] + 2 * (1 + 2)


def test_a_small_adapter_after_a_large_one_in_the_same_slot(model: Any) -> None:
    """Nothing of rank 64 is left under rank 4, in any layer, also in those that the small one does not change."""
    large, small = peft_model(model, 1, r=64), peft_model(model, 2, r=4, target_modules=["q_proj", "lm_head"])
    bank = bank_of(model, [large])
    bank.put(0, factors_of(small))
    prompt = torch.randint(3, 200, (9,))
    torch.testing.assert_close(answers(bank, [0], prompt[None])[0], alone(small, prompt), rtol=0, atol=ABOUT_FP32)
    bank.clear(0)
    torch.testing.assert_close(answers(bank, [0], prompt[None])[0], alone(model, prompt), rtol=0, atol=1e-6)


def test_adapters_come_and_go_and_the_others_do_not_notice(model: Any, adapters: list[Any]) -> None:
    bank = bank_of(model, adapters[:4])
    ids = torch.randint(3, 200, (3, 7))
    before = answers(bank, [0, 2, NO_SLOT], ids)
    bank.put(1, factors_of(adapters[4]))  # as large as what is there: the same products
    bank.put(3, factors_of(adapters[5]))
    bank.clear(1)
    with bank.seated([1, 3], 7):
        pass
    assert torch.equal(answers(bank, [0, 2, NO_SLOT], ids), before)
    size = bank.bytes
    bank.put(9, factors_of(peft_model(model, 3, r=48)))  # more slots, larger ranks
    assert bank.bytes > size
    assert bank.slots == 16
    torch.testing.assert_close(answers(bank, [0, 2, NO_SLOT], ids), before, rtol=0, atol=1e-6)
    expected = alone(adapters[5], ids[0])
    torch.testing.assert_close(answers(bank, [3], ids[:1])[0], expected, rtol=0, atol=ABOUT_FP32)


def test_what_is_not_a_number_in_one_slot_reaches_nobody_else(model: Any, adapters: list[Any], full: Bank) -> None:
    ids = torch.randint(3, 200, (6, 5))
    rows = [4, NO_SLOT, 2, 4, 0, 3]
    expected = answers(full, rows, ids)
    bank = bank_of(model, adapters)
    sick = {name: (a * float("nan"), b * float("inf")) for name, (a, b) in factors_of(adapters[4]).items()}
    bank.put(4, sick)
    found = answers(bank, rows, ids)
    assert found[[0, 3]].isnan().all()
    assert torch.equal(found[[1, 2, 4, 5]], expected[[1, 2, 4, 5]])
    bank.put(4, factors_of(adapters[4]))
    assert torch.equal(answers(bank, rows, ids), expected)


def test_factors_that_fit_no_layer_change_nothing(model: Any, adapters: list[Any]) -> None:
    bank = bank_of(model, adapters[:1])
    ids, good = torch.randint(3, 200, (1, 5)), factors_of(adapters[3])
    before, size = answers(bank, [0], ids), bank.bytes
    path, (a, b) = list(good.items())[-1]
    with pytest.raises(KeyError, match="nowhere"):
        bank.put(0, {**good, "model.nowhere": (a, b)})
    for wrong in [(a[:, :1], b), (a, b[:1]), (a[:2], b), (a[:2], b[:, :1])]:
        with pytest.raises(ValueError, match=path):
            bank.put(0, {**good, path: wrong})
    for slot in (NO_SLOT, 32):
        with pytest.raises(IndexError):
            bank.put(slot, good)
    for slot in (NO_SLOT, 1):
        with pytest.raises(IndexError):
            bank.clear(slot)
    with pytest.raises(ValueError, match="have rank 4"):
        bank.fill(0, good)
    assert bank.bytes == size
    assert torch.equal(answers(bank, [0], ids), before)


def test_stacks_made_in_inference_mode_can_be_written_outside_of_it(model: Any, adapters: list[Any]) -> None:
    """An engine loads adapters while it decodes; and factors may be parameters, whose graph nobody must keep."""
    with torch.inference_mode():
        bank = bank_of(model, [adapters[0], adapters[3]])
    bank.put(1, factors_of(adapters[0]))  # smaller: the stacks stay
    prompt = torch.randint(3, 200, (5,))
    with torch.enable_grad(), bank.seated([1], 5) as seated:
        found = seated(input_ids=prompt[None], use_cache=False).logits
    assert not found.requires_grad
    torch.testing.assert_close(found[0], alone(adapters[0], prompt), rtol=0, atol=ABOUT_FP32)


def test_under_autocast_the_factors_are_applied_in_their_own_precision(model: Any, adapters: list[Any]) -> None:
    """The engine computes over 16 bits this way. In float64 the bank's share is the same; the base's is rounded."""
    bank = bank_of(model, adapters[:3])
    site = bank.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    a, b = factors_of(adapters[2])["model.layers.0.self_attn.q_proj"]
    for rows in ([2, 2, 2], [2, NO_SLOT, 0]):
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), bank.seated(rows, 2):
            found, base = site(x)[0], site.layer(x)[0]
        assert found.dtype == torch.bfloat16
        expected = (base.double() + x[0].double() @ a.double().T @ b.double().T).float()
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)
