"""Seats: one batch at a time, nothing of it left afterwards; a product is shared while its input is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bank_lab import alone, answers, bank_of, factors_of, peft_model
from tiny_families import write_family
from torch import nn

from peftkit.generation.bank.bank import Bank
from peftkit.generation.bank.layout import NO_SLOT

QUERY, KEY = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
IDS = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_family(tmp_path_factory.mktemp("base"), "llama").requires_grad_(False)


@pytest.fixture(scope="module")
def adapters(model: Any) -> list[Any]:
    return [peft_model(model, seed) for seed in range(2)]


@pytest.fixture
def bank(model: Any, adapters: list[Any]) -> Bank:
    return bank_of(model, adapters)


def added(bank: Bank, path: str, x: torch.Tensor) -> torch.Tensor:
    """What the seated adapters add to the output of one layer."""
    site = bank.model.get_submodule(path)
    with torch.no_grad():
        difference: torch.Tensor = site(x) - site.layer(x)
    return difference


def delta(adapter: Any, path: str, x: torch.Tensor) -> torch.Tensor:
    a, b = factors_of(adapter)[path]
    return (x @ a.T @ b.T).detach()


def test_outside_of_a_batch_the_base_answers(model: Any, bank: Bank) -> None:
    answers(bank, [0, 1], IDS)
    torch.testing.assert_close(alone(bank.model, IDS[0]), alone(model, IDS[0]), rtol=0, atol=0)


def test_a_pass_that_fails_leaves_nobody_seated(model: Any, adapters: list[Any], bank: Bank) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = bank.model.get_submodule("model.layers.1.self_attn.k_proj").register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        answers(bank, [0, 1], IDS)
    handle.remove()
    assert torch.equal(alone(bank.model, IDS[0]), alone(model, IDS[0]))
    torch.testing.assert_close(answers(bank, [1], IDS[:1])[0], alone(adapters[1], IDS[0]), rtol=0, atol=1e-4)


def test_what_one_batch_has_computed_is_not_the_next_ones(adapters: list[Any], bank: Bank) -> None:
    """A pass may end between two layers of a group, and the next one may be given the same tensor, changed or not."""
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    with bank.seated([0], 3):
        added(bank, QUERY, x)
    for slot, factor in [(1, 1), (0, -3), (1, 0.5)]:
        x *= factor
        with bank.seated([slot], 3):
            torch.testing.assert_close(added(bank, KEY, x), delta(adapters[slot], KEY, x), rtol=0, atol=1e-5)


def test_within_a_batch_the_same_tensor_may_come_twice(adapters: list[Any], bank: Bank) -> None:
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    with bank.seated([1], 3):
        for factor in (1.0, -2.0, 0.5):
            x *= factor
            for path in (QUERY, KEY, QUERY.replace("q_proj", "v_proj")):
                torch.testing.assert_close(added(bank, path, x), delta(adapters[1], path, x), rtol=0, atol=1e-5)


def test_a_batch_within_a_batch_is_refused_and_the_outer_one_goes_on(adapters: list[Any], bank: Bank) -> None:
    expected = answers(bank, [0, 1], IDS)
    with bank.seated([0, 1], 5) as seated:
        with pytest.raises(RuntimeError, match="seated"), bank.seated([1, 0], 5):
            pass
        changes: list[Callable[[], None]] = [
            lambda: bank.put(0, factors_of(adapters[1])),
            lambda: bank.clear(1),
            lambda: bank.resize(1, {}),
            lambda: bank.move(0, 1),
        ]
        for change in changes:
            with pytest.raises(RuntimeError, match="seated"):
                change()
        with torch.no_grad():
            found = seated(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, expected)


def test_another_thread_waits_until_the_batch_is_over(model: Any, adapters: list[Any], bank: Bank) -> None:
    expected, begun, done = answers(bank, [0, 1], IDS), threading.Event(), threading.Event()

    def change() -> None:
        begun.set()
        bank.put(0, factors_of(adapters[1]))
        done.set()

    with bank.seated([0, 1], 5) as seated:
        thread = threading.Thread(target=change)
        thread.start()
        assert begun.wait(10)
        assert not done.wait(0.2)
        with torch.no_grad():
            found = seated(input_ids=IDS, use_cache=False).logits
    thread.join(10)
    assert done.is_set()
    assert torch.equal(found, expected)
    torch.testing.assert_close(answers(bank, [0], IDS[:1])[0], alone(adapters[1], IDS[0]), rtol=0, atol=1e-4)


def test_batches_of_several_threads_do_not_mix(bank: Bank) -> None:
    batches = [[0, 1], [1, 0], [NO_SLOT, 1], [0, NO_SLOT]]
    expected = [answers(bank, batch, IDS) for batch in batches]
    wrong: list[list[int]] = []

    def ask(i: int) -> None:
        for _ in range(10):
            if not torch.equal(answers(bank, batches[i], IDS), expected[i]):
                wrong.append(batches[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_slot_that_the_stacks_do_not_have(bank: Bank) -> None:
    for slots in ([0, 2], [-2]):
        with pytest.raises(IndexError), bank.seated(slots, 1):
            pass
    assert answers(bank, [0, 1], IDS).isfinite().all()


class Odd(nn.Module):  # type: ignore[misc]
    """Layers that look as if they had one input, and have not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice, self.beside = nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        x = self.table(input_ids)
        out = self.first(x)
        x.mul_(-2)  # in place: the same object, other numbers
        out = out + self.second(x)
        x = x + 0
        out = out + self.twice(x) + self.beside(x) + self.twice(out)
        chosen = input_ids % 3
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out = out + expert(x) * (chosen == i)[..., None]
        return SimpleNamespace(logits=out)


def test_layers_are_together_only_where_their_input_is_the_same() -> None:
    """Changed in place, called twice, or called by some tokens' choice with all of them: each stands alone."""
    torch.manual_seed(0)
    model = Odd().requires_grad_(False).eval()
    bank = Bank(model, dtype=torch.float32, device=torch.device("cpu"))
    names = ["first", "second", "twice", "beside", *(f"experts.{i}" for i in range(3))]
    # The experts are given the tensor that `twice` and `beside` were given.
    assert sorted(tuple(group.names) for group in bank._groups) == sorted((name,) for name in names)
    factors = [{name: (torch.randn(2, 8), torch.randn(8, 2)) for name in names} for _ in range(2)]
    for slot, each in enumerate(factors):
        bank.put(slot, each)
    found = answers_of(bank, [1, NO_SLOT, 0])
    for row, slot in enumerate([1, NO_SLOT, 0]):
        merged = Odd().requires_grad_(False)
        merged.load_state_dict(model.state_dict())
        for name, (a, b) in {} if slot == NO_SLOT else factors[slot].items():
            merged.get_submodule(name).weight += b @ a
        torch.testing.assert_close(found[row], merged(TOKENS[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_given_some_of_the_tokens_is_not_held() -> None:
    """Whose tokens an expert is given cannot be told from how many they are."""

    class Routed(Odd):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
            x = self.table(input_ids)
            out = self.first(x)
            for i, expert in enumerate(self.experts):
                chosen = input_ids % 3 == i
                out[chosen] = out[chosen] + expert(x[chosen])
            return SimpleNamespace(logits=out)

    bank = Bank(Routed().requires_grad_(False).eval(), dtype=torch.float32, device=torch.device("cpu"))
    assert bank.paths == {"first"}
    with pytest.raises(KeyError, match=r"experts\.1"):
        bank.put(0, {"experts.1": (torch.randn(2, 8), torch.randn(8, 2))})


TOKENS = torch.tensor([[0, 1, 2, 4], [3, 3, 0, 3], [5, 7, 8, 11]])


def answers_of(bank: Bank, slots: list[int]) -> torch.Tensor:
    with torch.no_grad(), bank.seated(slots, TOKENS.shape[1]) as seated:
        logits: torch.Tensor = seated(TOKENS).logits
    return logits
