"""The engine beside the plainest decoder there is: whoever comes, waits, leaves or fails, every answer is its own."""

from __future__ import annotations

import itertools
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.engine_lab import (
    LIVELY,
    Several,
    alone,
    ask,
    engine_of,
    held_bytes,
    ids,
    numbers,
    read_by,
    seats_in_use,
    tiny,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_bases import write_base

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import AdapterNotFound, ConfigError, EngineBusy, GenerationError
from peftkit.generation import choose
from peftkit.generation.engine import Engine
from peftkit.generation.requests import Sampling
from peftkit.generation.rows import Rows
from peftkit.generation.running import Row, Ticket
from peftkit.generation.seats import Alone

PREFIX = numbers(40, 99)
RAGGED = [
    numbers(1, 1),
    PREFIX + numbers(3, 2),
    numbers(90, 3),
    PREFIX,
    PREFIX,
    numbers(2, 4),
    PREFIX + numbers(30, 5),
    numbers(17, 6),
    PREFIX[:20] + numbers(4, 7),
]
NEW = [9, 3, 12, 1, 6, 2, 7, 5, 4]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lively"), seed=5, **LIVELY)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def wanted(model: Any) -> list[list[int]]:
    """Answers to RAGGED, each alone."""
    return [alone(model, prompt, new) for prompt, new in zip(RAGGED, NEW, strict=True)]


# ---- the same answers in every company


@pytest.mark.parametrize("prefix_bytes", [0, 64 << 20])
@pytest.mark.parametrize("prompt_tokens", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_greedy_answers_are_those_of_each_request_alone(
    rows: int, prompt_tokens: int, prefix_bytes: int, model: Any, tokenizer: Tokenizer, wanted: list[list[int]]
) -> None:
    engine = engine_of(model, tokenizer, rows=rows, prompt_tokens=prompt_tokens, prefix_bytes=prefix_bytes)
    tickets = [ask(engine, prompt, new) for prompt, new in zip(RAGGED, NEW, strict=True)]
    engine.run()
    assert [ids(ticket) for ticket in tickets] == wanted
    assert seats_in_use(engine) == 0
    assert held_bytes(engine) == 0


def test_these_answers_can_be_told_apart(wanted: list[list[int]]) -> None:
    assert len({tuple(answer) for answer in wanted}) >= len(wanted) - 2
    assert all(len(answer) == new for answer, new in zip(wanted, NEW, strict=True))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_requests_join_while_others_run(every: int, model: Any, tokenizer: Tokenizer, wanted: list[list[int]]) -> None:
    engine = engine_of(model, tokenizer, rows=4, prompt_tokens=32)
    tickets: list[Ticket] = []
    for prompt, new in zip(RAGGED, NEW, strict=True):
        tickets.append(ask(engine, prompt, new))
        for _ in range(every):
            engine.step()
    engine.run()
    assert [ids(ticket) for ticket in tickets] == wanted


@pytest.mark.parametrize("order", list(itertools.permutations([1, 3, 6])))
def test_rows_leave_in_every_order(order: tuple[int, ...], model: Any, tokenizer: Tokenizer) -> None:
    """While a fourth row is still being read, and then takes the place of one that has left."""
    engine = engine_of(model, tokenizer, prompt_tokens=20, prefix_bytes=0)
    prompts = [numbers(5 + 9 * i, i) for i in range(3)] + [numbers(75, 8)]
    tickets = [ask(engine, prompt, new) for prompt, new in zip(prompts, (*order, 4), strict=True)]
    engine.run()
    for ticket, prompt, new in zip(tickets, prompts, (*order, 4), strict=True):
        assert ids(ticket) == alone(model, prompt, new)


def test_the_oldest_prompt_is_read_first_however_many_come_and_go(model: Any, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, rows=3, prompt_tokens=8, prefix_bytes=0)
    ask(engine, numbers(5, 1), 2)
    long = ask(engine, numbers(80, 2), 1)
    steps = 0
    while not long.done:
        while engine.waiting < 3:
            ask(engine, numbers(5, steps), 1)
        engine.step()
        steps += 1
    assert steps == 1 + 80 // 8
    assert ids(long) == alone(model, numbers(80, 2), 1)


def test_a_short_request_that_comes_later_is_done_first_and_passes_are_shared(model: Any, tokenizer: Tokenizer) -> None:
    endless = replace(tokenizer, stop_ids=())

    def passes(*wishes: tuple[list[int], int]) -> int:
        engine = engine_of(model, endless)
        for prompt, new in wishes:
            ask(engine, prompt, new)
        engine.run()
        return engine.passes

    engine = engine_of(model, endless)
    long = ask(engine, numbers(9, 1), 200)
    engine.step()
    engine.step()
    short = ask(engine, numbers(7, 2), 5)
    while not short.done:
        engine.step()
    assert not long.done
    engine.run()
    assert len(ids(long)) == 200
    assert ids(short) == alone(model, numbers(7, 2), 5, ())
    apart = passes((numbers(9, 1), 200)) + passes((numbers(7, 2), 5))
    assert apart == 200 + 5
    assert engine.passes == 200 + 1 < apart  # one more than the long one alone: reading the short one's prompt


def test_a_schedule_by_hand(tokenizer: Tokenizer) -> None:
    """Passes as (rows, tokens): at most one over those that are answered, then one that reads, in every step."""
    model = tiny()
    seen = read_by(model)
    engine = engine_of(model, tokenizer, rows=2, prompt_tokens=6, prefix_bytes=0)
    for length, new in ((4, 3), (8, 2), (3, 2)):
        ask(engine, numbers(length, length), new)
    steps = []
    while True:
        seen.clear()
        more = engine.step()
        steps.append(list(seen))
        if not more:
            break
    assert steps == [
        [(1, 4)],  # 4 and 8 do not fit into 6 tokens together
        [(1, 1), (1, 6)],  # the first is answered; 6 tokens of the second's 8
        [(1, 1), (1, 2)],  # the first is done; the other 2, and the second's first token
        [(1, 1), (1, 3)],  # the second is done; the third has the first's row
        [(1, 1)],
    ]
    assert engine.passes == sum(map(len, steps))


# ---- sampling, stops, log-probabilities, limits


def test_sampled_answers_do_not_depend_on_company(tokenizer: Tokenizer) -> None:
    """In float64, so that no rounding of batched products changes a draw."""
    model = tiny().double()
    wishes = [Sampling(temperature=1.3, seed=i % 4, top_p=0.9 if i % 2 else 1.0, top_k=40 if i % 3 else 0)
              for i in range(len(RAGGED))]  # fmt: skip

    def sample(order: list[int], **limits: Any) -> dict[int, list[int]]:
        engine = engine_of(model, tokenizer, **limits)
        tickets = {i: ask(engine, RAGGED[i], 6, sampling=wishes[i]) for i in order}
        engine.run()
        return {i: ids(tickets[i]) for i in order}

    everyone = list(range(len(RAGGED)))
    together = sample(everyone)
    assert sample(everyone, rows=1) == together
    assert sample(everyone[::-1], rows=3, prompt_tokens=7) == together
    assert sample(everyone, prefix_bytes=0) == together
    assert {i: sample([i])[i] for i in everyone} == together
    assert together[3] != together[4]  # the same prompt, another seed


def test_stop_ids_and_stop_strings_end_an_answer_and_are_not_part_of_it(
    model: Any, tokenizer: Tokenizer, wanted: list[list[int]]
) -> None:
    free = wanted[2]
    text = tokenizer.decode(free[:8])
    stop_text = text[-2:]
    engine = engine_of(model, tokenizer)
    by_id = ask(engine, RAGGED[2], 12, stop_ids=(free[4],))
    by_text = ask(engine, RAGGED[2], 12, stop=("never", stop_text))
    beside = ask(engine, RAGGED[2], 12)
    engine.run()
    assert by_id.completion is not None
    assert by_id.completion.ids == free[: free.index(free[4])]
    assert by_id.completion.finish == "stop"
    assert by_text.completion is not None
    assert by_text.completion.text == text[: text.index(stop_text)]
    assert by_text.completion.finish == "stop"
    assert by_text.completion.stopped
    assert ids(beside) == free


def test_logprobs_are_those_of_a_plain_forward_pass(model: Any, tokenizer: Tokenizer, wanted: list[list[int]]) -> None:
    engine = engine_of(model, tokenizer, prompt_tokens=16)
    tickets = [ask(engine, p, new, logprobs=i % 4) for i, (p, new) in enumerate(zip(RAGGED, NEW, strict=True))]
    engine.run()
    for i, (ticket, prompt, answer) in enumerate(zip(tickets, RAGGED, wanted, strict=True)):
        assert ids(ticket) == answer
        assert ticket.completion is not None
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        known = logits.double().log_softmax(-1)
        assert len(ticket.completion.logprobs) == len(answer)
        for found, token, row in zip(ticket.completion.logprobs, answer, known, strict=True):
            assert found.token == token
            assert math.isclose(found.value, float(row[token]), abs_tol=1e-4)
            assert [t for t, _ in found.top] == row.topk(i % 4).indices.tolist()


def test_an_answer_by_a_schema_beside_free_ones(model: Any, tokenizer: Tokenizer, wanted: list[list[int]]) -> None:
    pytest.importorskip("llguidance")
    engine = engine_of(model, tokenizer)
    bound = ask(engine, RAGGED[2], 200, json_schema=SCHEMA)
    free = [ask(engine, prompt, new) for prompt, new in zip(RAGGED, NEW, strict=True)]
    engine.run()
    assert [ids(ticket) for ticket in free] == wanted
    assert bound.completion is not None
    assert bound.completion.finish == "stop"
    assert set(json.loads(bound.completion.text)) == {"a"}


def test_the_last_position_of_the_base_ends_an_answer(model: Any, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, positions=20)
    short = ask(engine, numbers(17, 1), 9)
    engine.run()
    assert ids(short) == alone(model, numbers(17, 1), 3)
    assert short.completion is not None
    assert short.completion.finish == "length"
    with pytest.raises((GenerationError, ConfigError), match=r"20 tokens(.|\n)*20"):
        ask(engine, numbers(20, 2), 1)
    assert engine.waiting == 0


# ---- coming, waiting and going


def test_cancelled_while_waiting_while_being_read_and_while_being_answered(model: Any, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, rows=2, prompt_tokens=10)
    answered = ask(engine, numbers(5, 1), 30)
    read = ask(engine, numbers(90, 2), 30)
    waiting = ask(engine, numbers(5, 3), 30)
    for _ in range(4):
        engine.step()
    known = alone(model, numbers(5, 1), 30)
    for ticket in (answered, read, waiting):
        ticket.cancel()
    after = ask(engine, numbers(12, 4), 5)
    engine.run()
    for ticket in (answered, read, waiting):
        assert ticket.completion is not None
        assert ticket.completion.finish == "cancelled"
        assert not ticket.completion.stopped
    assert answered.completion is not None
    assert answered.completion.ids == known[: len(answered.completion.ids)] != []
    assert read.completion is not None
    assert read.completion.ids == []
    assert ids(after) == alone(model, numbers(12, 4), 5)
    assert seats_in_use(engine) == 0


def test_a_ticket_that_is_cancelled_while_the_queue_is_looked_through_is_not_lost(
    model: Any, tokenizer: Tokenizer
) -> None:
    class Late(Ticket):
        """Cancelled between two looks at it."""

        looks = 0

        @property
        def cancelled(self) -> bool:
            self.looks += 1
            return self.looks > 1

        @cancelled.setter
        def cancelled(self, value: bool) -> None:
            pass

    engine = engine_of(model, tokenizer, rows=1)
    first, second = ask(engine, numbers(5, 1), 3), ask(engine, numbers(5, 2), 3)
    engine.step()
    second.__class__ = Late
    engine.run()
    assert first.done
    assert second.done


def test_a_full_queue_refuses_and_a_closed_engine_finishes_what_it_has(model: Any, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, rows=1, waiting=2)
    tickets = [ask(engine, numbers(5, i), 3) for i in range(3)]
    with pytest.raises(EngineBusy, match="0 requests are answered and 3 wait"):
        ask(engine, numbers(5, 9), 3)
    engine.step()
    with pytest.raises(EngineBusy, match="1 requests are answered and 2 wait"):
        ask(engine, numbers(5, 9), 3)
    engine.close()
    with pytest.raises(EngineBusy, match="no more requests"):
        ask(engine, numbers(5, 9), 3)
    engine.run()
    assert [ids(ticket) for ticket in tickets] == [alone(model, numbers(5, i), 3) for i in range(3)]
    assert not engine.step()


@pytest.mark.parametrize(("rows", "waiting"), [(1, 0), (4, 0), (4, 1)])
def test_a_burst_is_refused_only_when_there_is_neither_a_row_nor_a_place(
    rows: int, waiting: int, model: Any, tokenizer: Tokenizer
) -> None:
    engine = engine_of(model, tokenizer, rows=rows, waiting=waiting)
    for _ in range(2):
        tickets = [ask(engine, numbers(5, i), 2) for i in range(rows + waiting)]
        with pytest.raises(EngineBusy, match=f"expected: fewer than {rows + waiting} in all"):
            ask(engine, numbers(5, 9), 2)
        engine.run()
        assert all(ids(ticket) for ticket in tickets)


def test_who_has_just_got_a_row_is_counted_once(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, tokenizer, rows=2, waiting=0)
    first, take_out, asked = ask(engine, numbers(5, 1), 2), Engine._take_out, list[Ticket]()

    def asking(self: Engine, ticket: Ticket) -> None:
        if ticket is first:
            asked.append(ask(engine, numbers(5, 2), 2))
        take_out(self, ticket)

    monkeypatch.setattr(Engine, "_take_out", asking)
    engine.run()
    assert [ids(ticket) for ticket in (first, *asked)] == [alone(model, numbers(5, i), 2) for i in (1, 2)]


def test_many_threads_may_submit_while_one_drives(model: Any, tokenizer: Tokenizer) -> None:
    engine = engine_of(model, tokenizer, rows=4, waiting=3)
    found: dict[int, Ticket] = {}
    refused = [0] * 8

    def asker(me: int) -> None:
        for i in range(3):
            while True:
                try:
                    ticket = ask(engine, numbers(4 + me, 100 * me + i), 3)
                    break
                except EngineBusy:
                    refused[me] += 1
                    threading.Event().wait(0.001)
            found[10 * me + i] = ticket
            assert ticket.wait(60)

    threads = [threading.Thread(target=asker, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert engine.running + engine.waiting <= 4 + 3
        engine.step()
    assert len(found) == 24
    assert all(ids(ticket) == alone(model, ticket.request.prompt, 3) for ticket in found.values())
    assert seats_in_use(engine) == 0


def test_a_stream_gives_the_text_in_pieces_while_others_go_on(
    model: Any, tokenizer: Tokenizer, wanted: list[list[int]]
) -> None:
    engine = engine_of(model, tokenizer)
    tickets = [ask(engine, prompt, new) for prompt, new in zip(RAGGED, NEW, strict=True)]
    pieces = list(engine.stream(tickets[2]))
    assert "".join(pieces) == tokenizer.decode(wanted[2])
    assert len(pieces) > 2
    engine.run()
    assert "".join(engine.stream(tickets[0])) == tokenizer.decode(wanted[0])
    assert [ids(ticket) for ticket in tickets] == wanted


# ---- memory


def test_keys_and_values_stay_within_their_limit_and_are_given_back(model: Any, tokenizer: Tokenizer) -> None:
    """A token takes 2 layers x 2 x 1 head x 32 numbers x 4 bytes; the limit is two rows of 128 tokens."""
    limit = 2 * 128 * 512
    engine = engine_of(model, tokenizer, cache_bytes=limit, prompt_tokens=16)
    sizes = [(100, 20), (3, 4), (50, 14), (3, 8), (5, 200), (60, 60), (2, 2), (1, 255)]
    fit = [ask(engine, numbers(length, length), new) for length, new in sizes]
    never = ask(engine, numbers(100, 1), 200)
    last = ask(engine, numbers(4, 4), 4)
    most = busiest = 0
    while engine.step():
        most, busiest = max(most, held_bytes(engine)), max(busiest, engine.running)
    assert 0 < most <= limit
    assert busiest > 1
    assert held_bytes(engine) == 0
    for ticket, (length, new) in zip(fit, sizes, strict=True):
        assert ids(ticket) == alone(model, numbers(length, length), new)
    assert isinstance(never.error, GenerationError)
    assert never.error.fact == f"300 tokens need {320 * 512} bytes of keys and values"
    assert never.error.expected == f"at most {limit}"
    assert ids(last) == alone(model, numbers(4, 4), 4)
    assert seats_in_use(engine) == 0


def test_room_that_rows_took_and_left_counts_until_it_is_given_back(model: Any, tokenizer: Tokenizer) -> None:
    """Of eight short rows one stays. A long row fits beside it, once the room of the seven others is given back."""
    limit = 8 * 64 * 512
    engine = engine_of(model, tokenizer, cache_bytes=limit)
    short = [ask(engine, numbers(4, i), 20 if i == 5 else 2) for i in range(8)]
    for _ in range(3):
        engine.step()
    long = ask(engine, numbers(150, 9), 50)
    engine.step()
    assert engine.running == 2
    while engine.step():
        assert held_bytes(engine) <= limit
    assert ids(long) == alone(model, numbers(150, 9), 50)
    assert ids(short[5]) == alone(model, numbers(4, 5), 20)


def test_what_a_row_takes_stays_in_the_room_it_was_let_in_for(model: Any, tokenizer: Tokenizer) -> None:
    """A long row with little left to read, beside a short one with much: the fill must not make the cache grow."""
    engine = engine_of(model, tokenizer, cache_bytes=2 * 64 * 512)
    first = ask(engine, numbers(58, 1), 1)
    engine.run()
    long = ask(engine, [*numbers(58, 1), 7], 3)
    short = ask(engine, numbers(40, 2), 3)
    while engine.step():
        assert held_bytes(engine) <= 2 * 64 * 512
    assert ids(long) == alone(model, [*numbers(58, 1), 7], 3)
    assert ids(short) == alone(model, numbers(40, 2), 3)
    assert first.done


def test_a_row_that_finds_no_memory_is_no_row(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, tokenizer)
    first = ask(engine, numbers(5, 1), 6)
    engine.step()
    second, third = ask(engine, numbers(300, 2), 6), ask(engine, numbers(9, 3), 6)
    true = Rows.reserve

    def scarce(self: Rows, rows: int, length: int) -> None:
        if length > 200:
            raise torch.OutOfMemoryError("full")
        true(self, rows, length)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "reserve", scarce)
        engine.run()
    assert isinstance(second.error, torch.OutOfMemoryError)
    assert ids(first) == alone(model, numbers(5, 1), 6)
    assert ids(third) == alone(model, numbers(9, 3), 6)
    assert seats_in_use(engine) == 0


# ---- what goes wrong


class Spoiled(RuntimeError):
    """Planted."""


def spoil(model: Any, at: int, error: BaseException) -> None:
    """Raise in the middle of the model, in its pass number `at` from now on, and once."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise error

    model.get_submodule("model.layers.1").register_forward_pre_hook(hook)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_error_ends_the_answers_of_one_model_and_no_others(at: int, tokenizer: Tokenizer) -> None:
    good, bad = tiny(), tiny(seed=6)
    engine = engine_of({"good": good, "bad": bad}, tokenizer, prompt_tokens=8)
    spoil(bad, at, Spoiled("planted"))
    fine = [ask(engine, numbers(6 + i, i), 5, adapter="good") for i in range(2)]
    lost = [ask(engine, numbers(6 + i, i), 5, adapter="bad") for i in range(2)]
    engine.run()
    later = ask(engine, numbers(9, 1), 5, adapter="bad")
    engine.run()
    assert any(isinstance(ticket.error, Spoiled) for ticket in lost)
    for ticket in lost:
        assert ticket.completion is not None
        assert ticket.completion.finish == "failed"
        assert ticket.completion.error == "planted"
        assert not ticket.completion.stopped
    for i, ticket in enumerate(fine):
        assert ids(ticket) == alone(good, numbers(6 + i, i), 5)
    assert ids(later) == alone(bad, numbers(9, 1), 5)
    assert seats_in_use(engine) == 0


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MambaForCausalLM", "BloomForCausalLM"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_an_interrupted_step_is_run_again(at: int, kind: str, tokenizer: Tokenizer) -> None:
    model = tiny(kind, state_size=4, n_layer=2, n_head=2)
    prompts = [numbers(12, 1), numbers(20, 2), numbers(3, 3)]
    known = [alone(model, prompt, 4) for prompt in prompts]
    engine = engine_of(model, tokenizer, prompt_tokens=16)
    places = {"Llama": "model.layers.1", "Mamba": "backbone.layers.1", "Bloom": "transformer.h.1"}
    layer = model.get_submodule(places[kind.removesuffix("ForCausalLM")])
    count = [0]

    def interrupt(*_: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt

    layer.register_forward_pre_hook(interrupt)
    tickets = [ask(engine, prompt, 4) for prompt in prompts]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    assert [ids(ticket) for ticket in tickets] == known
    assert seats_in_use(engine) == 0


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interruption_between_a_pass_and_the_choice_loses_nothing(
    at: int, model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, count = choose.choose_all, [0]

    def interrupted(*args: Any, **kwargs: Any) -> list[int]:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return true(*args, **kwargs)

    monkeypatch.setattr("peftkit.generation.engine.choose_all", interrupted)
    engine = engine_of(model, tokenizer, prompt_tokens=16)
    prompts = [numbers(12, 1), numbers(20, 2), numbers(3, 3)]
    tickets = [ask(engine, prompt, 4) for prompt in prompts]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    assert [ids(ticket) for ticket in tickets] == [alone(model, prompt, 4) for prompt in prompts]


def test_a_model_that_gives_no_numbers_fails_its_row_and_leaves_nothing_behind(
    model: Any, tokenizer: Tokenizer
) -> None:
    """One token's embedding is NaN: its row's keys and values are too, and who takes the place must not see them."""
    broken = tiny()
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = torch.nan
    engine = engine_of(broken, tokenizer, rows=2)
    poisoned = [ask(engine, [50] * length, 9) for length in (40, 30)]
    after = [ask(engine, [9] * (3 + i), 5) for i in range(4)]
    engine.run()
    for ticket in poisoned:
        assert isinstance(ticket.error, GenerationError)
        assert ticket.completion is not None
        assert ticket.completion.finish == "failed"
    for i, ticket in enumerate(after):
        assert ids(ticket) == alone(model, [9] * (3 + i), 5)


def test_nan_of_a_neighbour_that_leaves_does_not_reach_a_row_that_moves_to_its_place(
    model: Any, tokenizer: Tokenizer
) -> None:
    broken = tiny()
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = torch.nan
    engine = engine_of(broken, tokenizer, prefix_bytes=0, prompt_tokens=10_000)
    poisoned = ask(engine, [9] * 3 + [50] * 40, 5)
    rest = [ask(engine, numbers(4, 60), 30), ask(engine, [9] * 50, 30)]
    known = [alone(broken, ticket.request.prompt, 30) for ticket in rest]
    engine.run()
    assert poisoned.error is not None
    assert [ids(ticket) for ticket in rest] == known


def test_what_goes_wrong_before_a_row_begins_ends_that_request_alone(model: Any, tokenizer: Tokenizer) -> None:
    adapters = Several({"a": model, "b": model})
    adapters.broken = {"b"}
    engine = engine_of(adapters, tokenizer)
    broken, fine = ask(engine, numbers(5, 1), 3, adapter="b"), ask(engine, numbers(5, 1), 3, adapter="a")
    engine.run()
    assert isinstance(broken.error, OSError)
    assert ids(fine) == alone(model, numbers(5, 1), 3)
    with pytest.raises(AdapterNotFound):
        ask(engine, numbers(5, 1), 3, adapter="c")
    assert adapters.held.total() == 0


def test_seats_that_run_out_are_waited_for_in_order(model: Any, tokenizer: Tokenizer) -> None:
    adapters = Several({"a": model})
    adapters.free = 2
    engine = engine_of(adapters, tokenizer)
    tickets = [ask(engine, numbers(5, i), 3, adapter="a") for i in range(6)]
    done: list[int] = []
    while engine.step():
        assert engine.running == adapters.held.total() <= 2
        done += [i for i, ticket in enumerate(tickets) if ticket.done and i not in done]
    assert done == sorted(done)
    assert [ids(ticket) for ticket in tickets] == [alone(model, numbers(5, i), 3) for i in range(6)]


def test_an_error_in_one_answer_ends_that_answer_alone(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Row.accept

    def accept(self: Row, token: int, logits: torch.Tensor) -> None:
        if self.ticket.request.prompt == (7, 7):
            raise Spoiled("planted")
        true(self, token, logits)

    monkeypatch.setattr(Row, "accept", accept)
    engine = engine_of(model, tokenizer)
    bad, good = ask(engine, [7, 7], 4), ask(engine, [7, 8], 4)
    engine.run()
    assert isinstance(bad.error, Spoiled)
    assert ids(good) == alone(model, [7, 8], 4)
    assert seats_in_use(engine) == 0


# ---- prompts that begin alike


def test_what_was_read_is_never_shared_between_contents_of_one_name(tokenizer: Tokenizer) -> None:
    """A name that is published again: the same name, the same prompt, another content."""
    old, new = tiny(seed=5), tiny(seed=6)
    prompt = numbers(30, 1)
    adapters = Several({"a": old}, {"a": "one"})
    engine = engine_of(adapters, tokenizer)
    first = ask(engine, prompt, 5, adapter="a")
    engine.run()
    adapters.models["a"], adapters.digests["a"] = Alone(new), "two"
    second = ask(engine, prompt, 5, adapter="a")
    engine.run()
    assert ids(first) == alone(old, prompt, 5)
    assert ids(second) == alone(new, prompt, 5) != ids(first)


def test_two_adapters_read_the_same_prompt_each_for_itself(tokenizer: Tokenizer) -> None:
    one, other = tiny(seed=5), tiny(seed=6)
    engine = engine_of({"one": one, "other": other}, tokenizer)
    tickets = [ask(engine, PREFIX + numbers(3, i), 4, adapter=("one", "other")[i % 2]) for i in range(6)]
    engine.run()
    for i, ticket in enumerate(tickets):
        assert ids(ticket) == alone((one, other)[i % 2], PREFIX + numbers(3, i), 4)


def test_the_next_turn_reads_what_is_new_in_it(tokenizer: Tokenizer) -> None:
    """All that was read can be taken again; the last token of an answer never was."""
    model = tiny()
    seen = read_by(model)
    engine = engine_of(model, tokenizer)
    first = ask(engine, PREFIX, 6)
    engine.run()
    seen.clear()
    turn = [*PREFIX, *ids(first), 8, 9]
    second = ask(engine, turn, 1)
    engine.run()
    assert seen == [(1, len(turn) - (len(PREFIX) + 5))]
    again = ask(engine, turn, 3)
    seen.clear()
    engine.step()
    assert seen == [(1, 1)]
    engine.run()
    assert ids(second) == alone(model, turn, 1)
    assert ids(again) == alone(model, turn, 3)


def test_prompts_that_cannot_be_kept_are_not_waited_for(tokenizer: Tokenizer) -> None:
    """The first of eight prompts tells that there is no room for it; the others are read together."""
    model = tiny()
    seen = read_by(model)
    engine = engine_of(model, tokenizer, prefix_bytes=60 * 512)
    tickets = [ask(engine, numbers(100, 1) + numbers(4, i), 1) for i in range(8)]
    engine.run()
    assert seen == [(1, 104), (7, 104)]
    assert [ids(ticket) for ticket in tickets] == [alone(model, ticket.request.prompt, 1) for ticket in tickets]


def test_a_beginning_is_taken_from_a_row_that_is_still_answered(tokenizer: Tokenizer) -> None:
    """Nothing is kept, and yet the 100 tokens that eight prompts share are read once; the digest decides who shares."""
    model = tiny()
    seen = read_by(model)
    engine = engine_of(model, tokenizer, prefix_bytes=0)
    tickets = [ask(engine, numbers(100, 1) + numbers(4, i), 3) for i in range(8)]
    engine.run()
    assert seen[:3] == [(1, 104), (1, 1), (7, 4)]
    assert [ids(ticket) for ticket in tickets] == [alone(model, ticket.request.prompt, 3) for ticket in tickets]


# ---- any order of events


class Company(RuleBasedStateMachine):
    """Requests of three adapters come, are cancelled and answered in any order; answers are always their own."""

    models: dict[str | None, Any]
    tokenizer: Tokenizer
    known: dict[Any, list[int]]

    @initialize(
        rows=st.integers(1, 5),
        prompt_tokens=st.sampled_from([3, 16, 2048]),
        prefix_bytes=st.sampled_from([0, 30 * 512, 64 << 20]),
        cache=st.sampled_from([None, 4 * 64 * 512, 4 * 128 * 512]),
        free=st.sampled_from([None, 2]),
    )
    def begin(self, rows: int, prompt_tokens: int, prefix_bytes: int, cache: int | None, free: int | None) -> None:
        self.rows, self.cache, self.closed = rows, cache, False
        self.adapters = Several(self.models)
        self.adapters.free = free
        limits = {"rows": rows, "prompt_tokens": prompt_tokens, "prefix_bytes": prefix_bytes, "cache_bytes": cache}
        self.engine = engine_of(self.adapters, self.tokenizer, waiting=6, **limits)
        ask(self.engine, [9], 1)  # the first row tells what a token takes; an engine's models are of one base elsewhere
        self.engine.run()
        self.tickets: list[Ticket] = []

    @precondition(lambda self: not self.closed)
    @rule(
        name=st.sampled_from([None, "one", "slow"]),
        prefix=st.sampled_from([0, 17, 30]),
        rest=st.sampled_from([1, 2, 3, 4, 5, 70]),
        new=st.integers(1, 6),
    )
    def submit(self, name: str | None, prefix: int, rest: int, new: int) -> None:
        prompt = PREFIX[:prefix] + numbers(rest, rest)
        if self.engine.running + self.engine.waiting >= self.rows + 6:
            with pytest.raises(EngineBusy):
                ask(self.engine, prompt, new, adapter=name)
        else:
            self.tickets.append(ask(self.engine, prompt, new, adapter=name))

    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        if self.tickets:
            self.tickets[which % len(self.tickets)].cancel()

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: len(self.tickets) > 4)
    @rule()
    def close(self) -> None:
        self.engine.close()
        self.closed = True

    @invariant()
    def rows_have_seats(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert self.engine.running == self.adapters.held.total() <= self.rows
        assert self.cache is None or held_bytes(self.engine) <= self.cache
        for _, lane in self.engine._lanes.values():
            answering = getattr(lane, "_answering", 0)
            assert all(row.generated for row in lane.rows[:answering])
            if hasattr(lane, "_answering"):
                assert not any(row.generated for row in lane.rows[answering:])

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        assert self.adapters.held.total() == 0
        for ticket in self.tickets:
            assert ticket.completion is not None
            request, answer = ticket.request, ticket.completion.ids
            key = request.adapter, request.prompt, request.max_new_tokens
            if key not in self.known:
                self.known[key] = alone(self.models[request.adapter], request.prompt, request.max_new_tokens)
            if ticket.completion.finish == "cancelled":
                assert ticket.cancelled
                assert answer == self.known[key][: len(answer)]
            else:
                assert ids(ticket) == self.known[key]


def test_any_order_of_events(tokenizer: Tokenizer) -> None:
    models = {None: tiny(seed=5), "one": tiny(seed=6), "slow": tiny("MambaForCausalLM", state_size=4)}

    class Here(Company):
        pass

    Here.models, Here.tokenizer, Here.known = models, tokenizer, {}
    run_state_machine_as_test(Here, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))
