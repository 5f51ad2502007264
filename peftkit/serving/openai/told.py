"""Answers as OpenAI's clients read them: whole, or chunk by chunk."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.generation.requests import Completion, Logprob
from peftkit.serving.openai.calls import Call
from peftkit.serving.openai.tokens import Offsets, token_bytes, token_text

_LEAST = -9999.0  # OpenAI's for what is next to impossible; JSON has no infinity

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Choice:
    """One whole answer."""

    completion: Completion
    content: str
    """Its text, without what became calls."""
    calls: Sequence[Call] = ()
    logprobs: bool = False
    """Whether log-probabilities were asked for."""
    before: str = ""
    """The prompt, where the answer repeats it."""
    told: int = 0
    """Of how many tokens the log-probabilities stood in its pieces."""

    @property
    def scores(self) -> Sequence[Logprob] | None:
        """The log-probabilities of all its tokens, where they were asked for."""
        return self.completion.logprobs if self.logprobs else None

    @property
    def untold(self) -> Sequence[Logprob] | None:
        """Those that stood in none of its pieces; None for none."""
        return (self.scores or ())[self.told :] or None

    @property
    def finish(self) -> str:
        """Why it ended, in OpenAI's words."""
        return "tool_calls" if self.calls and self.completion.finish == "stop" else self.completion.finish


@dataclass(frozen=True)
class Head:
    """What every object of one response has in common."""

    chat: bool
    model: str
    """What answers: `name@version`, or the base."""
    fingerprint: str
    """Of the base."""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, model: str, fingerprint: str, *, chat: bool) -> Head:
        """A new one."""
        return cls(chat, model, f"fp_{fingerprint[:12]}", f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}")

    def whole(self, choices: Sequence[dict[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """A response that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._common(kind), "choices": list(choices), "usage": dict(usage)}

    def chunk(self, *choices: Mapping[str, Any], usage: Mapping[str, int] | None = None) -> bytes:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self._common(kind), "choices": list(choices), **({"usage": dict(usage)} if usage else {})})

    def _common(self, kind: str) -> dict[str, Any]:
        common = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**common, "system_fingerprint": self.fingerprint}


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """How much was read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def chat_choice(index: int, choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
    """A whole answer in a conversation."""
    content = None if choice.calls and not choice.content else choice.content
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.calls:
        message["tool_calls"] = [_call(call) for call in choice.calls]
    logprobs = chat_logprobs(choice.scores, tokenizer)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}


def chat_delta(index: int, delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A piece of an answer in a conversation."""
    return {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": None}


def call_deltas(calls: Sequence[Call]) -> dict[str, Any]:
    """Whole calls as the delta of a chunk."""
    return {"tool_calls": [{"index": at, **_call(call)} for at, call in enumerate(calls)]}


def text_choice(index: int, choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
    """A whole text."""
    logprobs = text_logprobs(choice.scores, tokenizer, Offsets(tokenizer))
    return {
        "index": index,
        "text": choice.before + choice.content,
        "logprobs": logprobs,
        "finish_reason": choice.finish,
    }


def text_delta(index: int, piece: str, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A piece of a text."""
    return {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": None}


class Teller:
    """Writes the chunks of one answer that is streamed, in their order."""

    def __init__(self, index: int, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._index, self._tokenizer, self._chat = index, tokenizer, chat
        self._offsets = Offsets(tokenizer)

    def piece(self, text: str, scores: Sequence[Logprob] = ()) -> dict[str, Any]:
        """A piece of the text, with the log-probabilities of tokens that came with it."""
        if self._chat:
            return chat_delta(self._index, {"content": text}, chat_logprobs(scores or None, self._tokenizer))
        return text_delta(self._index, text, text_logprobs(scores or None, self._tokenizer, self._offsets))

    def end(self, choice: Choice) -> dict[str, Any]:
        """The last chunk, with the log-probabilities that no piece had."""
        if self._chat:
            last = chat_delta(self._index, {}, chat_logprobs(choice.untold, self._tokenizer))
        else:
            last = text_delta(self._index, "", text_logprobs(choice.untold, self._tokenizer, self._offsets))
        return {**last, "finish_reason": choice.finish}


def chat_logprobs(scores: Sequence[Logprob] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Log-probabilities of tokens in a conversation; None where they were not asked for."""
    if scores is None:
        return None
    content = [
        {
            **_chat_token(each.token, each.value, tokenizer),
            "top_logprobs": [_chat_token(token, value, tokenizer) for token, value in each.top],
        }
        for each in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(scores: Sequence[Logprob] | None, tokenizer: Tokenizer, offsets: Offsets) -> dict[str, Any] | None:
    """The older form: lists, and where each token begins in the text. A prompt that is repeated has none."""
    if scores is None:
        return None
    return {
        "tokens": [_spelled(each.token, tokenizer) for each in scores],
        "token_logprobs": [_finite(each.value) for each in scores],
        "top_logprobs": [{_spelled(token, tokenizer): _finite(value) for token, value in each.top} for each in scores],
        "text_offset": offsets.next(each.token for each in scores),
    }


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_token(token: int, value: float, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = token_bytes(token, tokenizer)
    as_list = None if spelled is None else list(spelled)
    return {"token": token_text(token, tokenizer), "logprob": _finite(value), "bytes": as_list}


def _spelled(token: int, tokenizer: Tokenizer) -> str:
    """A token as OpenAI's texts spell it: bytes that are no whole character by their numbers."""
    text, spelled = token_text(token, tokenizer), token_bytes(token, tokenizer)
    if "\ufffd" not in text or spelled is None:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(value: float) -> float:
    return max(value, _LEAST)
