"""What a body of /v1/chat/completions or /v1/completions asks for. Nothing in it is passed over in silence."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftkit.generation.requests import Request, Sampling
from peftkit.serving.openai.calls import forced_schema
from peftkit.serving.openai.fields import Fields, kind, shown
from peftkit.serving.openai.turns import Tools, read_messages, read_tools
from peftkit.serving.spec import ServeSpec

MOST_CHOICES = 128
"""Answers to one request: `n` times its prompts. It is OpenAI's bound of `n`."""
_MOST_STOPS = 4  # OpenAI's
_MOST_TOP = 20  # OpenAI's
_LONGEST_NAME = 300
"""Of a model: an adapter's with its alias has 129 at most, and bases are named by owner and repository."""
_SEEDS = (-(2**63), 2**64 - 1)  # what the engine takes
_HOTTEST = 2.0  # OpenAI's

# Nothing that an answer depends on: accounts, caches, tiers and guesses that only save time.
_WITHOUT_EFFECT = (
    "user", "metadata", "service_tier", "safety_identifier", "prediction",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What both kinds of request have."""

    model: str
    like: Request
    """Everything but the prompt."""
    n: int
    """Answers to each prompt."""
    stream: bool
    usage: bool
    """Whether a stream ends with the usage."""
    exact: bool
    """Whether the client itself said how many tokens: then a prompt that leaves fewer is refused."""

    def choices(self) -> list[Request]:
        """One request for each answer; the seed of each is the next number after that of the one before."""
        first, span = self.like.sampling.seed, _SEEDS[1] - _SEEDS[0] + 1
        seeds = [(first + at - _SEEDS[0]) % span + _SEEDS[0] for at in range(self.n)]
        return [replace(self.like, sampling=replace(self.like.sampling, seed=seed)) for seed in seeds]


@dataclass(frozen=True)
class Chat(Asked):
    """The next turn of a conversation."""

    turns: tuple[Mapping[str, Any], ...]
    tools: Tools


@dataclass(frozen=True)
class Text(Asked):
    """Texts to go on with."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    """Whether an answer begins with its prompt."""


def read_chat(body: bytes, spec: ServeSpec) -> Chat:
    """What a body of /v1/chat/completions asks for. Raises Refused with everything that is wrong with it."""
    fields = Fields.of(body)
    turns, tools = read_messages(fields), read_tools(fields)
    schema = _response_format(fields)
    if schema is not None and tools.listed:
        fields.wrong("response_format", "and tools exclude each other: expected one of them, or tool_choice 'none'")
    if tools.choice == "required":
        schema = forced_schema(tools)
    most = _most_tokens(fields, spec, "max_tokens", "max_completion_tokens")
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, _MOST_TOP)
    if top and not wanted:
        fields.wrong("top_logprobs", f"is {top}, and logprobs is not true")
    like = _like(fields, spec, most, (top or 0) if wanted else None, schema)
    _refuse_chat(fields)
    shared = _shared(fields, spec, like, prompts=1, exact=most is not None)
    fields.close()
    fields.problems.check()
    return Chat(**shared, turns=tuple(turns), tools=tools)


def read_text(body: bytes, spec: ServeSpec) -> Text:
    """What a body of /v1/completions asks for. Raises Refused with everything that is wrong with it."""
    fields = Fields.of(body)
    prompts, echo = _prompts(fields), fields.flag("echo")
    most = _most_tokens(fields, spec, "max_tokens")
    logprobs = fields.whole("logprobs", 0, _MOST_TOP)
    if echo and logprobs is not None:
        fields.wrong("echo", "is true with logprobs: those of a prompt are not computed")
    like = _like(fields, spec, most, logprobs, None)
    fields.neutral("best_of", 1, fields.get("n"), why="every answer is returned; take n")
    fields.neutral("suffix", "", why="an answer goes on after its prompt")
    shared = _shared(fields, spec, like, prompts=len(prompts), exact=most is not None)
    fields.close()
    fields.problems.check()
    return Text(**shared, prompts=tuple(prompts), echo=echo)


def _shared(fields: Fields, spec: ServeSpec, like: Request, *, prompts: int, exact: bool) -> dict[str, Any]:
    """What `Asked` holds."""
    model = fields.text("model", required=True)
    if model == "":
        fields.wrong("model", "is empty: expected a name that /v1/models lists")
    if model is not None and len(model) > _LONGEST_NAME:
        fields.wrong("model", f"is {shown(model)} ({len(model)} characters): expected at most {_LONGEST_NAME}")
    most = max(1, min(MOST_CHOICES, spec.waiting))
    n = fields.whole("n", 1, most) or 1
    if prompts > 1 and prompts * n > most:
        fields.wrong("prompt", f"asks for {prompts * n} answers ({prompts} prompts, n {n}): expected at most {most}")
    stream, options = fields.flag("stream"), fields.inner("stream_options")
    usage = False
    if options is not None:
        if not stream:
            fields.wrong("stream_options", "is given, and stream is not true")
        usage = options.flag("include_usage")
        options.ignored("include_obfuscation")
        options.close()
    return {"model": model, "like": like, "n": n, "stream": stream, "usage": usage, "exact": exact}


def _like(
    fields: Fields, spec: ServeSpec, most: int | None, logprobs: int | None, schema: Mapping[str, Any] | None
) -> Request:
    temperature, top_p = fields.number("temperature", 0, _HOTTEST), fields.number("top_p", 0, 1, above=True)
    top_k = fields.whole("top_k", -1, 2**31 - 1) or 0
    seed = fields.whole("seed", *_SEEDS)
    sampling = Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, top_k),  # -1 is all of them elsewhere
        seed=secrets.randbits(62) if seed is None else seed,
    )
    fields.neutral("presence_penalty", 0, why="likelihoods are the model's own")
    fields.neutral("frequency_penalty", 0, why="likelihoods are the model's own")
    fields.neutral("repetition_penalty", 1, why="likelihoods are the model's own")
    fields.neutral("logit_bias", {}, why="likelihoods are the model's own")
    fields.neutral("min_p", 0, why="take top_p or top_k")
    fields.ignored(*_WITHOUT_EFFECT)
    return Request(
        prompt=(),
        max_new_tokens=most or spec.default_new_tokens,
        sampling=sampling,
        stop=_stops(fields),
        logprobs=logprobs,
        json_schema=schema,
    )


def _most_tokens(fields: Fields, spec: ServeSpec, *names: str) -> int | None:
    given = [found for name in names if (found := fields.whole(name, 1, spec.max_new_tokens)) is not None]
    if len(set(given)) > 1:
        fields.wrong(names[0], f"is {given[0]}, and {names[1]} is {given[1]}: expected one of them")
    return given[0] if given else None


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > _MOST_STOPS or not all(isinstance(s, str) and s for s in listed):
        fields.wrong("stop", f"is {shown(value)}: expected a text, or up to {_MOST_STOPS} of them, none empty")
        return ()
    return tuple(listed)


def _response_format(fields: Fields) -> Mapping[str, Any] | None:
    """The schema that an answer must follow."""
    form = fields.inner("response_format")
    if form is None:
        return None
    wanted = form.choice("type", ("text", "json_object", "json_schema"), required=True)
    schema: Mapping[str, Any] | None = {"type": "object"} if wanted == "json_object" else None
    if wanted == "json_schema" and (inner := form.inner("json_schema", required=True)) is not None:
        schema = inner.mapping("schema", required=True)
        inner.text("name", required=True)
        inner.flag("strict")  # a schema is always kept to
        inner.ignored("description")
        inner.close()
    if wanted is not None:
        form.close()
    return schema


def _refuse_chat(fields: Fields) -> None:
    """What only conversations have, and this server has not."""
    fields.neutral("functions", [], why="send tools")
    fields.neutral("function_call", "none", why="send tool_choice")
    fields.neutral("modalities", ["text"], why="this server answers in text")
    fields.neutral("audio", why="this server answers in text")
    fields.neutral("reasoning_effort", "none", why="no template variable is set by it")
    fields.neutral("verbosity", "medium", why="say it in a message")
    fields.neutral("web_search_options", why="this server looks nothing up")
    fields.neutral("moderation", why="this server does not judge texts")
    fields.neutral("store", False, why="this server keeps no answers")


def _prompts(fields: Fields) -> list[str | tuple[int, ...]]:
    """One text, several, the token ids of one, or those of several."""
    value = fields.get("prompt")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return list(value)
        if _ids(value):
            return [tuple(value)]
        if all(isinstance(each, list) and each and _ids(each) for each in value):
            return [tuple(each) for each in value]
    said = "is missing" if value is None else "is empty" if value == [] else f"is {kind(value)} that cannot be read"
    fields.wrong("prompt", f"{said}: expected a text, a list of texts, token ids, or a list of lists of token ids")
    return []


def _ids(value: list[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value)
