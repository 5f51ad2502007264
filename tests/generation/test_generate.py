"""Generation against the plainest decoder there is: one prompt, no cache, no padding, the highest logit each time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.engine_lab import CPU, LIVELY, alone, numbers, read_by
from tiny_bases import write_base
from transformers import AutoModelForCausalLM, GenerationConfig

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.generation.generate import generate
from peftkit.generation.prefixes import common
from peftkit.generation.requests import Sampling


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lively"), seed=5, **LIVELY)


@pytest.fixture(scope="module")
def model(lively: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(lively), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(lively: Path) -> Tokenizer:
    return load_tokenizer(lively)


def answers(model: Any, prompts: list[list[int]], tokenizer: Tokenizer, new: int = 12, **options: Any) -> Any:
    done = generate(model, prompts, tokenizer, device=CPU, max_new_tokens=new, **options)
    return [(completion.ids, completion.stopped) for completion in done]


def expected(model: Any, prompts: list[list[int]], tokenizer: Tokenizer, new: int = 12) -> Any:
    """Greedy answers by the definition, and whether a stop token ended them: then they are shorter than asked."""
    done = [alone(model, prompt, new, tokenizer.stop_ids) for prompt in prompts]
    return [(ids, len(ids) < new) for ids in done]


PREFIX = numbers(40, 99)
PROMPTS = {
    "shared prefix": [PREFIX + numbers(length, length) for length in (3, 1, 9, 5)],
    "shared prefix, one prompt is all of it": [PREFIX + numbers(4, 1), PREFIX, PREFIX + numbers(11, 2)],
    "the same prompt twice": [PREFIX, PREFIX, [*PREFIX, 7]],
    "nothing shared, very different lengths": [numbers(1, 1), numbers(120, 2), numbers(17, 3), numbers(2, 4)],
    "a prefix too short to share": [PREFIX[:10] + numbers(5, 1), PREFIX[:10] + numbers(9, 2)],
    "exactly worth sharing": [PREFIX[:16] + numbers(5, 1), PREFIX[:16] + numbers(9, 2)],
    "one prompt": [PREFIX],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_answers_are_those_of_each_prompt_alone(name: str, model: Any, tokenizer: Tokenizer) -> None:
    prompts = PROMPTS[name]
    wanted = expected(model, prompts, tokenizer)
    assert answers(model, prompts, tokenizer) == wanted
    assert answers(model, prompts, tokenizer, batch_size=2) == wanted
    assert answers(model, prompts, tokenizer, batch_size=1) == wanted


def test_these_prompts_and_this_model_can_tell_answers_apart(model: Any, tokenizer: Tokenizer) -> None:
    """Negative control: answers differ between prompts, within an answer, and with any early token of the prompt."""
    prompts = PROMPTS["shared prefix"]
    given = [tuple(ids) for ids, _ in expected(model, prompts, tokenizer)]
    assert len(set(given)) == len(given)
    assert all(len(set(ids)) > 3 for ids in given)
    moved = [[*prompt[:2], 200, *prompt[3:]] for prompt in prompts]
    assert not set(given) & {tuple(ids) for ids, _ in expected(model, moved, tokenizer)}


def test_what_prompts_begin_with_is_read_once_and_only_where_it_is_worth_it(lively: Path, tokenizer: Tokenizer) -> None:
    """Passes as (rows, tokens of a row): the shortest prompt is read first, and then what the others add to it."""
    model = AutoModelForCausalLM.from_pretrained(str(lively), dtype=torch.float32).eval()
    passes = read_by(model)
    read = {}
    for name, prompts in PROMPTS.items():
        passes.clear()
        answers(model, prompts, tokenizer, new=1)
        read[name] = list(passes)
    assert read == {
        "shared prefix": [(1, 41), (3, 9)],
        "shared prefix, one prompt is all of it": [(1, 40), (2, 11)],
        "the same prompt twice": [(1, 40), (2, 1)],  # the last token of a prompt must still be read
        "nothing shared, very different lengths": [(4, 120)],
        "a prefix too short to share": [(2, 19)],
        "exactly worth sharing": [(1, 21), (1, 9)],
        "one prompt": [(1, 40)],
    }


def test_transformers_own_generate_gives_the_same_tokens(model: Any, tokenizer: Tokenizer) -> None:
    prompts = PROMPTS["shared prefix"]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[2], pad_token_id=2)
    theirs = [
        model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert [ids for ids, _ in answers(model, prompts, tokenizer)] == [[t for t in ids if t != 2] for ids in theirs]


def test_answers_end_before_a_stop_token_and_say_that_they_did(model: Any, tokenizer: Tokenizer) -> None:
    prompts = PROMPTS["shared prefix"]
    free = [ids for ids, _ in answers(model, prompts, tokenizer, new=20)]
    other = {token for ids in free[1:] for token in ids}
    stop = next(token for token in free[0][3:] if token not in other)  # ends the first answer and no other
    stopping = replace(tokenizer, stop_ids=(2, stop))
    got = answers(model, prompts, stopping, new=20)
    assert got == expected(model, prompts, stopping, new=20)
    assert got[0] == (free[0][: free[0].index(stop)], True)
    assert got[1:] == [(ids, False) for ids in free[1:]]


def test_max_new_tokens_is_met_exactly_and_never_counts_as_stopped(model: Any, tokenizer: Tokenizer) -> None:
    prompts = PROMPTS["shared prefix"]
    long = [ids for ids, _ in answers(model, prompts, tokenizer, new=20)]
    for new in (1, 7):
        assert answers(model, prompts, tokenizer, new=new) == [(ids[:new], False) for ids in long]


def test_texts_are_those_of_the_ids_without_the_stop(model: Any, tokenizer: Tokenizer) -> None:
    done = generate(model, PROMPTS["shared prefix"], tokenizer, device=CPU, max_new_tokens=6)
    assert [c.text for c in done] == [tokenizer.decode(c.ids) for c in done]
    assert all("<|im_end|>" not in c.text for c in done)


def test_nothing_to_answer_is_no_error_and_progress_counts_answers(model: Any, tokenizer: Tokenizer) -> None:
    assert answers(model, [], tokenizer) == []
    told: list[int] = []
    answers(model, PROMPTS["shared prefix"], tokenizer, new=1, batch_size=3, progress=told.append)
    assert told == [1, 4]  # one is read alone, for what the others begin with
    told.clear()
    answers(model, PROMPTS["nothing shared, very different lengths"], tokenizer, new=1, progress=told.append)
    assert told == [4]


def test_samples_repeat_with_their_seed_and_leave_the_global_randomness_alone(model: Any, tokenizer: Tokenizer) -> None:
    prompts = PROMPTS["shared prefix"]

    def sample(seed: int) -> Any:
        return answers(model, prompts, tokenizer, sampling=Sampling(temperature=1.5, seed=seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(1) == first
    assert sample(2) != first
    assert first != answers(model, prompts, tokenizer)
    assert torch.equal(torch.get_rng_state(), torch.random.manual_seed(2).get_state())


def test_a_tiny_nucleus_is_greedy(model: Any, tokenizer: Tokenizer) -> None:
    prompts = PROMPTS["shared prefix"]
    narrow = answers(model, prompts, tokenizer, sampling=Sampling(temperature=1.0, top_p=1e-6))
    assert narrow == answers(model, prompts, tokenizer)


def test_sampling_draws_from_the_whole_vocabulary(model: Any, tokenizer: Tokenizer) -> None:
    """At a huge temperature all 259 tokens are about as likely; nothing that nobody asked for may cut them off."""
    prompts = [PREFIX] * 400
    done = answers(model, prompts, tokenizer, new=1, batch_size=400, sampling=Sampling(temperature=1e4))
    drawn = {ids[0] for ids, _ in done if ids}
    # 400 uniform draws of 259 hit 259·(1 − (1 − 1/259)⁴⁰⁰) ≈ 204 different ones, standard deviation < 7
    assert len(drawn) > 150


def test_defaults_that_a_base_ships_do_not_bend_greedy_decoding(lively: Path, tmp_path: Path) -> None:
    """Qwen's generation_config.json has a repetition penalty, which transformers would apply to greedy answers too."""
    folder = Path(shutil.copytree(lively, tmp_path / "penalised"))
    shipped = {"eos_token_id": 2, "pad_token_id": 2, "repetition_penalty": 3.0, "do_sample": True, "temperature": 0.1,
               "no_repeat_ngram_size": 1, "top_k": 1}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(shipped))
    backbone = load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=32, device="cpu"), tmp_path / "cache")
    prompts = [[*PREFIX, *PREFIX, 9], [*PREFIX, *PREFIX, 200, 17]]
    assert answers(backbone.model, prompts, backbone.tokenizer) == expected(backbone.model, prompts, backbone.tokenizer)


def test_every_prompt_draws_by_a_seed_of_its_own(model: Any, tokenizer: Tokenizer) -> None:
    """Prompt i begins at seed + i, whatever the order in which they are answered."""
    prompts = [numbers(30, 7)] * 3 + [numbers(5, 8)]
    sampling = Sampling(temperature=1.5, seed=10)
    together = answers(model, prompts, tokenizer, sampling=sampling)
    assert len({tuple(ids) for ids, _ in together[:3]}) == 3
    for i, prompt in enumerate(prompts):
        one = answers(model, [prompt], tokenizer, sampling=replace(sampling, seed=10 + i))
        assert one == [together[i]]


def test_what_goes_wrong_is_raised_and_the_rest_is_not_tried(lively: Path, tokenizer: Tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(lively), dtype=torch.float32).eval()
    tried: list[int] = []

    def full(*_: Any) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError("full")

    model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        generate(model, [numbers(8, i) for i in range(40)], tokenizer, device=CPU, batch_size=4)
    assert len(tried) == 1


@pytest.mark.base
def test_a_real_base_answers_a_batch_as_it_answers_each_prompt(embedded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(embedded), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(embedded)
    questions = ["Name a colour.", "What is the capital of France? Answer in one word.", "Hi"]
    prompts = [
        tokenizer.hf.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    assert common(tuple(prompts[0]), tuple(prompts[1])) >= 16
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=[2], pad_token_id=2)
    alone = [
        model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    got = answers(model, prompts, tokenizer, new=10)
    assert [ids for ids, _ in got] == [[token for token in ids if token != 2] for ids in alone]
    assert [stopped for _, stopped in got] == [2 in ids for ids in alone]
    assert any(stopped for _, stopped in got)
