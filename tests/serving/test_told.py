"""Answers are what OpenAI's own types say they are, field by field, and spell tokens as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import (
    AdapterDamaged,
    AdapterNotFound,
    BaseMismatch,
    ConfigError,
    DataError,
    EngineBusy,
    EngineGone,
    GenerationError,
    RegistryError,
)
from peftkit.generation.requests import Completion, Logprob
from peftkit.serving.openai.calls import Call
from peftkit.serving.openai.failures import Draining, Refused, about, answer_for
from peftkit.serving.openai.tokens import token_bytes, token_text
from peftkit.serving.openai.told import (
    Choice,
    Head,
    Teller,
    call_deltas,
    chat_choice,
    chat_delta,
    text_choice,
    text_delta,
    usage,
)

CALLS = (Call("call_1", "f", '{"a": 1}'), Call("call_2", "g", "{}"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def completion(tokenizer: Tokenizer, text: str = "Añ", finish: Any = "stop") -> Completion:
    ids = tokenizer.encode(text)
    logprobs = tuple(Logprob(token, -0.5, ((token, -0.5), (40, -math.inf))) for token in ids)
    return Completion(text, ids, finish == "stop", finish, "tickets@1", logprobs)


def only_known(value: Any, at: str = "") -> None:
    """Nothing in an answer is unknown to the client's types."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, at
        for name in type(value).model_fields:
            only_known(getattr(value, name), f"{at}.{name}")
    elif isinstance(value, list):
        for each in value:
            only_known(each, at)


def strictly(kind: type[BaseModel], value: Any) -> Any:
    found = kind.model_validate(value, strict=True)
    only_known(found)
    return found


def events(*chunks: bytes) -> list[Any]:
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)
    return [json.loads(chunk[6:]) for chunk in chunks]


@pytest.mark.parametrize("calls", [(), CALLS])
@pytest.mark.parametrize("logprobs", [True, False])
def test_whole_answers_are_of_the_clients_types(tokenizer: Tokenizer, calls: Any, logprobs: bool) -> None:
    choice = Choice(completion(tokenizer), "Añ", calls, logprobs)
    head = Head.of("tickets@1", "ab" * 32, chat=True)
    found = strictly(ChatCompletion, head.whole([chat_choice(0, choice, tokenizer)], usage(5, 3)))
    assert (found.model, found.system_fingerprint, found.usage.total_tokens) == ("tickets@1", "fp_abababababab", 8)
    first = found.choices[0]
    assert first.finish_reason == ("tool_calls" if calls else "stop")
    assert [(c.id, c.function.name, c.function.arguments) for c in first.message.tool_calls or ()] == [
        (call.id, call.name, call.arguments) for call in calls
    ]
    assert (first.logprobs is not None) == logprobs
    head = Head.of("base", "ab" * 32, chat=False)
    written = text_choice(3, Choice(completion(tokenizer), "Añ", (), logprobs, "said: "), tokenizer)
    texts = strictly(TextCompletion, head.whole([written], usage(5, 3)))
    assert (texts.choices[0].text, texts.choices[0].index) == ("said: Añ", 3)


def test_chunks_are_of_the_clients_types(tokenizer: Tokenizer) -> None:
    head, choice = Head.of("tickets@1", "ab", chat=True), Choice(completion(tokenizer), "Añ", CALLS, True)
    given = events(
        head.chunk(chat_delta(0, {"role": "assistant", "content": ""})),
        head.chunk(chat_delta(0, {"content": "ñ"})),
        head.chunk(chat_delta(0, call_deltas(CALLS))),
        head.chunk(Teller(0, tokenizer, chat=True).end(choice)),
        head.chunk(usage=usage(1, 2)),
    )
    found = [strictly(ChatCompletionChunk, each) for each in given]
    assert len({(each.id, each.created, each.model) for each in found}) == 1
    assert [call.index for call in found[2].choices[0].delta.tool_calls] == [0, 1]
    assert found[3].choices[0].finish_reason == "tool_calls"
    assert found[4].choices == []
    head = Head.of("tickets@1", "ab", chat=False)
    piece, last = events(head.chunk(text_delta(1, "x")), head.chunk(Teller(1, tokenizer, chat=False).end(choice)))
    assert piece["choices"][0].pop("finish_reason") is None  # which the client's type has only for whole ones
    piece["choices"][0]["finish_reason"] = "stop"
    assert strictly(TextCompletion, piece).choices[0].text == "x"
    last["choices"][0]["finish_reason"] = "stop"
    assert strictly(TextCompletion, last).choices[0].index == 1


def test_an_answer_that_was_cut_off_does_not_end_in_calls(tokenizer: Tokenizer) -> None:
    assert Choice(completion(tokenizer, finish="length"), "", CALLS).finish == "length"


def test_two_responses_have_two_ids() -> None:
    assert len({Head.of("m", "f", chat=chat).id for chat in (True, False) for _ in range(20)}) == 40


def test_logprobs_spell_every_token(tokenizer: Tokenizer) -> None:
    choice = Choice(completion(tokenizer, "Añ"), "Añ", (), True)
    tokens = chat_choice(0, choice, tokenizer)["logprobs"]["content"]
    assert [each["bytes"] for each in tokens] == [[0x41], [0xC3], [0xB1]]
    assert [each["token"] for each in tokens] == ["A", "\ufffd", "\ufffd"]
    assert tokens[0]["top_logprobs"][1]["logprob"] == -9999.0
    old = text_choice(0, choice, tokenizer)["logprobs"]
    assert old["tokens"] == ["A", "bytes:\\xc3", "bytes:\\xb1"]
    assert old["text_offset"] == [0, 1, 1]
    empty = Choice(Completion("", [], True), "", (), True)
    assert chat_choice(0, empty, tokenizer)["logprobs"] == {"content": [], "refusal": None}


def test_bytes_of_all_tokens_make_up_any_text(tokenizer: Tokenizer) -> None:
    text = "Aé \u20ac\U0001f600\n\x00"
    ids = tokenizer.encode(text)
    assert b"".join(token_bytes(token, tokenizer) or b"?" for token in ids) == text.encode()
    assert token_text(2, tokenizer) == "<|im_end|>"


def test_sentencepiece_tokens_keep_their_space_and_their_byte(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE(vocab={"<unk>": 0, "</s>": 1, "▁the": 2, "<0xE2>": 3}, merges=[], byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([2]) == "the"
    assert token_text(2, tokenizer) == " the"
    assert token_bytes(2, tokenizer) == b" the"
    assert token_bytes(3, tokenizer) == b"\xe2"


def full_disk() -> RegistryError:
    error = RegistryError("could not tag")
    error.__cause__ = OSError(28, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (AdapterNotFound("x"), 404, "model_not_found"),
        (EngineBusy("x"), 429, "rate_limit_exceeded"),
        (Draining("x"), 503, "shutting_down"),
        (EngineGone("x"), 503, "engine_unavailable"),
        (ConfigError(["x"]), 400, None),
        (DataError("x"), 400, None),
        (BaseMismatch("x"), 400, "base_mismatch"),
        (RegistryError("x"), 400, None),
        (AdapterDamaged("x"), 500, "adapter_damaged"),
        (GenerationError("x"), 500, None),
        (Refused(413, "x", param="body", code="too_large"), 413, "too_large"),
        (full_disk(), 500, None),
        (ValueError("a secret"), 500, None),
    ],
)
def test_errors_have_openais_form(error: Exception, status: int, code: str | None) -> None:
    response = answer_for(error)
    told = json.loads(bytes(response.body))["error"]
    assert (response.status_code, told["code"]) == (status, code)
    assert set(told) == {"message", "type", "param", "code"}
    assert "secret" not in told["message"]
    assert ("retry-after" in response.headers) == isinstance(error, EngineBusy)
    assert (response.headers.get("x-should-retry") == "false") == (status == 500)


def said(error: Exception) -> str:
    message: str = json.loads(bytes(answer_for(error).body))["error"]["message"]
    return message


def test_a_message_repeats_no_more_of_what_was_sent_than_fits_on_a_page() -> None:
    for error in (AdapterNotFound("x" * 1_000_000), Refused(400, "é" * 1_000_000), ConfigError(["x" * 1_000_000])):
        assert len(said(error)) == 4000
        assert said(error).endswith("…")
    assert said(Refused(400, "x" * 4000)) == "x" * 4000


def test_one_problem_is_told_without_a_heading_and_several_are_listed() -> None:
    assert said(ConfigError(["the prompt is empty"], where="the request")) == "the prompt is empty"
    assert said(ConfigError(["no"], where="json_schema", hint="do")) == "json_schema: no\n  to mend it: do"
    assert said(ConfigError(["a", "b"], where="the request")) == "2 problems in the request\n- a\n- b"


def test_what_is_wrong_with_a_parameter_names_it() -> None:
    for error, told in ((ConfigError(["no"], where="the request"), "no"), (DataError("never"), "never")):
        with pytest.raises(Refused) as caught, about("prompt"):
            raise error
        assert (caught.value.status, caught.value.param, caught.value.message) == (400, "prompt", told)
    with pytest.raises(EngineBusy), about("prompt"):
        raise EngineBusy("later")
