"""What goes wrong with one answer, one model or one bound, and what must not go wrong with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generation.adapters_lab import make_lab
from generation.engine_lab import CPU, Several, alone, ask, engine_of, ids, numbers, read_by, seats_in_use, tiny
from peft import PromptTuningConfig, TaskType
from tiny_bases import write_base
from tuning.method_zoo import reload

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import EngineBusy, GenerationError
from peftkit.generation.engine import Engine
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.rows import Rows
from peftkit.generation.seats import Seat
from peftkit.tuning.prompted import PromptedModel


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_base(tmp_path_factory.mktemp("base")))


def test_a_head_with_an_adapter_answers_beside_rows_without_one(tmp_path: Path) -> None:
    """Only the last token of each row reaches the head, and all of them reach the layers below."""
    lab = make_lab(tmp_path, tie_word_embeddings=False)
    backbone = lab.backbone()
    lora = {
        "head": lab.lora("head", 1, targets=("q_proj", "lm_head")),
        "plain": lab.lora("plain", 2),
    }
    fleet = Fleet(backbone, lab.registry.resolve)
    engine = Engine(fleet, backbone.tokenizer, device=CPU, vocabulary=259)
    names = ["head", None, "plain", "head", None]
    tickets = [ask(engine, numbers(12 + i, i), 6, adapter=name) for i, name in enumerate(names)]
    engine.run()
    assert fleet.statistics().alone == ()
    for i, (name, ticket) in enumerate(zip(names, tickets, strict=True)):
        model = reload(copy.deepcopy(backbone.model), lora[name].path) if name else backbone.model
        assert ids(ticket) == alone(model, numbers(12 + i, i), 6), name


def test_a_token_that_cannot_be_decoded_ends_its_own_answer(tokenizer: Tokenizer) -> None:
    model, prompts = tiny(), [numbers(9, i) for i in range(3)]
    wanted = [alone(model, prompt, 8) for prompt in prompts]
    (bad,) = [token for token in wanted[0] if all(token not in other for other in wanted[1:])][:1]

    class Torn(Tokenizer):
        def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
            if bad in ids:
                raise TypeError("no text")
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    engine = engine_of(model, Torn(tokenizer.hf, tokenizer.stop_ids, tokenizer.pad_id))
    tickets = [ask(engine, prompt, 8) for prompt in prompts]
    engine.run()
    assert [ticket.completion and ticket.completion.finish == "failed" for ticket in tickets] == [True, False, False]
    assert [ids(ticket) for ticket in tickets[1:]] == wanted[1:]
    assert seats_in_use(engine) == 0


def test_a_device_that_fails_in_everything_still_ends_every_answer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(Rows, "wipe", broken)
    engine = engine_of(tiny(), tokenizer)
    tickets = [ask(engine, numbers(20, i), 4) for i in range(3)]
    engine.run()
    assert all(ticket.done for ticket in tickets)
    assert seats_in_use(engine) == 0


def test_no_memory_for_what_is_only_kept_for_later_fails_nobody(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Rows, "copy_of", full)
    model = tiny()
    engine = engine_of(model, tokenizer)
    tickets = [ask(engine, numbers(20, i), 4) for i in range(3)]
    engine.run()
    assert [ids(ticket) for ticket in tickets] == [alone(model, numbers(20, i), 4) for i in range(3)]


def test_whoever_waits_for_a_row_counts_as_waiting(tokenizer: Tokenizer) -> None:
    """A request that is submitted while others are let in finds the queue as full as it is."""
    refused = []

    class Asking(Several):
        def seat(self, identity: Any) -> Seat | None:
            try:
                ask(engine, numbers(40, 9), 1)
            except EngineBusy as error:
                refused.append(error)
            return None

    engine = engine_of(Asking({None: tiny()}), tokenizer, rows=1, waiting=1)
    for i in range(2):
        ask(engine, numbers(40, i), 1)
    for _ in range(3):
        engine.step()
        assert engine.waiting == 2
    assert len(refused) == 3


def test_one_token_answers_are_not_waited_for_when_nothing_is_kept(tokenizer: Tokenizer) -> None:
    model = tiny()
    seen = read_by(model)
    engine = engine_of(model, tokenizer, prefix_bytes=0)
    for i in range(8):
        ask(engine, numbers(20, 3) + numbers(6, i), 1)
    engine.run()
    assert seen == [(8, 26)]


def test_virtual_tokens_take_positions(tokenizer: Tokenizer) -> None:
    """48 positions: 8 virtual tokens and a prompt of 36 leave 4 for the answer, and one of 40 leaves none."""
    settings = transformers.GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=2, n_positions=48)
    base = transformers.GPT2LMHeadModel(settings).eval()
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8, tokenizer_name_or_path="x")
    model = PromptedModel(base, prompt).eval()
    engine = engine_of(model, tokenizer, positions=48)
    tickets = [ask(engine, numbers(length, length), 10) for length in (36, 40, 5)]
    engine.run()
    assert ids(tickets[0]) == alone(model, numbers(36, 36), 4)
    assert isinstance(tickets[1].error, GenerationError)
    assert "40 tokens, and the adapter puts 8 before it" in str(tickets[1].error)
    assert ids(tickets[2]) == alone(model, numbers(5, 5), 10)
