"""Room that rows have left makes way for a request that fits only so: at once, within the limit, and harming nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation.engine_lab import LIVELY, alone, ask, engine_of, held_bytes, ids, numbers, seats_in_use, tiny
from tiny_bases import write_base

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.generation.engine import Engine
from peftkit.generation.rows import Rows
from peftkit.generation.running import Ticket

TOKEN = 512
"""Bytes: 2 layers x keys and values x 1 head x 32 numbers x 4."""
PREFIX = numbers(20, 99)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without stop tokens: an answer is as long as it was asked for."""
    return replace(load_tokenizer(write_base(tmp_path_factory.mktemp("lively"), seed=5, **LIVELY)), stop_ids=())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def after_a_burst(engine: Engine, rows: int, stay: int, **wishes: Any) -> list[Ticket]:
    """So many rows of 64 tokens' room were answered at once, and the last of them are not done."""
    burst = [ask(engine, numbers(4 + i % 5, i), 50 if i >= rows - stay else 2, **wishes) for i in range(rows)]
    while not all(ticket.done for ticket in burst[: rows - stay]):
        engine.step()
    assert engine.running == stay
    assert held_bytes(engine) == rows * 64 * TOKEN
    return burst


def check(model: Any, tickets: list[Ticket]) -> None:
    for ticket in tickets:
        assert ids(ticket) == alone(model, ticket.request.prompt, ticket.request.max_new_tokens, ())


@pytest.mark.parametrize("rows", [16, 64])
def test_a_long_request_after_a_burst_gets_its_row_at_the_next_step(
    rows: int, model: Any, tokenizer: Tokenizer
) -> None:
    """The more rows there may be, the sooner: not the room that a burst took decides, but what runs and what comes."""
    limit = 64 * 128 * TOKEN
    engine = engine_of(model, tokenizer, rows=rows, cache_bytes=limit, prefix_bytes=0)
    burst = after_a_burst(engine, rows, stay=2)
    coming = [ask(engine, numbers(20, 1), 140), *(ask(engine, numbers(3, i), 40) for i in range(8))]
    engine.step()
    assert (engine.running, engine.waiting) == (11, 0)
    while engine.step():
        assert held_bytes(engine) <= limit
    check(model, burst + coming)
    assert seats_in_use(engine) == held_bytes(engine) == 0


@pytest.mark.parametrize("prefix_bytes", [0, 64 << 20])
def test_what_is_shared_with_a_row_or_kept_is_found_after_the_block_has_shrunk(
    prefix_bytes: int, model: Any, tokenizer: Tokenizer
) -> None:
    limit = 16 * 64 * TOKEN
    engine = engine_of(model, tokenizer, cache_bytes=limit, prefix_bytes=prefix_bytes)
    stays = ask(engine, PREFIX, 40)
    engine.step()
    burst = [ask(engine, PREFIX + numbers(2, i), 2) for i in range(15)]
    while not all(ticket.done for ticket in burst):
        engine.step()
    assert held_bytes(engine) == limit
    long = ask(engine, PREFIX + numbers(180, 1), 20)
    engine.step()
    assert engine.running == 2
    assert held_bytes(engine) == 2 * 256 * TOKEN
    engine.run()
    check(model, [stays, *burst, long])


def test_room_for_long_rows_that_have_left_makes_way_for_many_short_ones(model: Any, tokenizer: Tokenizer) -> None:
    limit = 8 * 64 * TOKEN
    engine = engine_of(model, tokenizer, cache_bytes=limit, prefix_bytes=0)
    stays, long = ask(engine, numbers(3, 1), 50), ask(engine, numbers(150, 2), 3)
    while not long.done:
        engine.step()
    assert held_bytes(engine) == 2 * 192 * TOKEN
    short = [ask(engine, numbers(5, i), 9) for i in range(7)]
    engine.step()
    assert engine.running == 8
    assert held_bytes(engine) == limit
    engine.run()
    check(model, [stays, long, *short])


def test_the_room_of_another_model_s_rows_makes_way_too(tokenizer: Tokenizer) -> None:
    models = {"one": tiny(seed=5), "other": tiny(seed=6)}
    limit = 8 * 64 * TOKEN
    engine = engine_of(models, tokenizer, cache_bytes=limit, prefix_bytes=0)
    burst = after_a_burst(engine, 8, stay=1, adapter="one")
    coming = ask(engine, numbers(150, 1), 40, adapter="other")
    engine.step()
    assert engine.running == 2
    while engine.step():
        assert held_bytes(engine) <= limit
    check(models["one"], burst)
    check(models["other"], [coming])


def test_what_fits_beside_the_room_that_is_there_takes_none_away(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts of one kind follow each other without a copy; and what fits not even so waits without one."""
    engine = engine_of(model, tokenizer, cache_bytes=8 * 64 * TOKEN, prefix_bytes=0)
    resized, true = [], Rows._resize

    def noted(self: Rows, rows: int, length: int) -> None:
        resized.append((rows, length))
        true(self, rows, length)

    burst = after_a_burst(engine, 8, stay=1)
    monkeypatch.setattr(Rows, "_resize", noted)
    burst += [ask(engine, numbers(5, i), 2) for i in range(6)]
    engine.step()
    assert engine.running == 7
    stays = ask(engine, numbers(6, 7), 30)
    while engine.running > 2:
        engine.step()
    too_long = ask(engine, numbers(250, 1), 6)  # 256 tokens beside two rows: 4 x 256
    for _ in range(3):
        engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    assert resized == []
    engine.run()
    check(model, [*burst, stays, too_long])


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Iterator[None]:
    """While it lasts, making the new tensor number `at` raises; a block of this model has 4."""
    true, calls = torch.Tensor.new_zeros, [0]

    def planted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise error
        return true(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", planted)
        yield


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_no_memory_to_shrink_ends_the_request_that_comes_and_no_other(
    at: int, error: type[BaseException], model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 8 * 64 * TOKEN
    engine = engine_of(model, tokenizer, cache_bytes=limit, prefix_bytes=0)
    burst = after_a_burst(engine, 8, stay=2)
    long, short = ask(engine, numbers(100, 1), 10), ask(engine, numbers(9, 2), 9)
    with failing(monkeypatch, at, error("planted")):
        engine.step()
    assert isinstance(long.error, error)
    assert engine.running == 3
    again = ask(engine, numbers(100, 1), 10)
    while engine.step():
        assert held_bytes(engine) <= limit
    check(model, [*burst, short, again])
    assert seats_in_use(engine) == 0


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interruption_while_the_block_shrinks_loses_nothing(
    at: int, model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 8 * 64 * TOKEN
    engine = engine_of(model, tokenizer, cache_bytes=limit, prefix_bytes=0)
    burst = after_a_burst(engine, 8, stay=2)
    long = ask(engine, numbers(100, 1), 10)
    with failing(monkeypatch, at, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.step():
        assert held_bytes(engine) <= limit
    check(model, [*burst, long])
    assert seats_in_use(engine) == 0
