"""OpenAI's routes: models, conversations and texts, streamed and not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from peftkit.errors import AdapterNotFound, PeftkitError, RegistryError
from peftkit.generation.constrain import Grammar
from peftkit.registry.layout import parse_reference
from peftkit.registry.store import Version
from peftkit.serving.host import Host
from peftkit.serving.metrics import Metrics
from peftkit.serving.openai.asked import Asked, Chat, Text, read_chat, read_text
from peftkit.serving.openai.call_forms import Spelling, form_of, shown
from peftkit.serving.openai.calls import Form, Reading
from peftkit.serving.openai.failures import Refused, about, answer_for, failure_of
from peftkit.serving.openai.flight import Deadline, Ended, Flight, Left, OnWay, Piece, begin, unless_left
from peftkit.serving.openai.told import (
    DONE,
    Head,
    Teller,
    call_deltas,
    chat_choice,
    chat_delta,
    event,
    text_choice,
    text_delta,
    usage,
)
from peftkit.serving.openai.turns import Tools
from peftkit.serving.spec import ServeSpec

A = TypeVar("A", bound=Asked)
T = TypeVar("T")
_AT_ONCE = 64
"""Tokens with log-probabilities that take less time than a thread's turn does when others wait for one."""
_LEFT = 499  # nginx's, for logs: nobody reads it
_NO_TOOLS = Tools()
# A proxy that collects a response before it passes it on makes a stream none.
_STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def routes(host: Host, spec: ServeSpec, metrics: Metrics) -> list[Route]:
    """OpenAI's routes over a host."""
    api = _Api(host, spec, metrics)
    return [
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
    ]


class _Api:
    def __init__(self, host: Host, spec: ServeSpec, metrics: Metrics) -> None:
        self._host, self._spec, self._metrics = host, spec, metrics
        self._compiles = ThreadPoolExecutor(1, thread_name_prefix="peftkit-schemas")

    async def models(self, request: HttpRequest) -> Response:
        listed = [_model(model.id, model.since) for model in self._host.models()]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: HttpRequest) -> Response:
        asked = str(request.path_params["model"])
        await self._find(asked)
        since = {model.id: model.since for model in self._host.models()}
        known = since.get(asked, since.get(asked.partition("@")[0], since[self._host.base]))
        return JSONResponse(_model(asked, known))

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answered(request, read_chat, self._begin_chat)

    async def complete(self, request: HttpRequest) -> Response:
        return await self._answered(request, read_text, self._begin_text)

    async def _answered(
        self,
        request: HttpRequest,
        read: Callable[[bytes, ServeSpec], A],
        start: Callable[[A], Awaitable[list[OnWay]]],
    ) -> Response:
        """The response to a request, whatever goes wrong with it that can be foreseen."""
        try:
            asked = read(await request.body(), self._spec)
            flight = await unless_left(request, self._begun(asked, start), lambda lost: lost.end("cancelled"))
        except (Left, ClientDisconnect):
            return Response(status_code=_LEFT)
        except (PeftkitError, Refused) as error:
            return answer_for(error)
        if asked.stream:
            return _Stream(self._events(asked, flight), flight)
        try:
            whole = await unless_left(request, self._whole(asked, flight), lambda lost: None)
            return JSONResponse(whole)
        except (Left, asyncio.CancelledError) as gone:
            flight.end("cancelled")
            if isinstance(gone, Left):
                return Response(status_code=_LEFT)
            raise
        except (PeftkitError, Refused) as error:
            return answer_for(error)
        finally:
            flight.end("failed")

    # ---- begin

    async def _begun(self, asked: A, start: Callable[[A], Awaitable[list[OnWay]]]) -> Flight:
        deadline = Deadline.of(self._spec.request_seconds)
        watch = self._metrics.begun(asked.model)
        async with deadline.kept():
            answers = await start(asked)
        flight = Flight(answers, self._host.engine.tokenizer, watch, deadline)
        positions = self._host.engine.positions
        longest, new = max(each.answer.prompt_tokens for each in flight.answers), asked.like.max_new_tokens
        if asked.exact and positions is not None and longest + new > positions:
            for each in flight.answers:
                each.answer.cancel()
            raise Refused(
                400,
                f"a prompt of {longest} tokens and an answer of {new} are more than the base's {positions} positions",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return flight

    async def _begin_chat(self, asked: Chat) -> list[OnWay]:
        """Found once and rendered once: a name may change hands while the answers begin."""
        version = await self._find(asked.model)
        form, spelling = await self._form(asked, version)
        tools, turns = asked.tools, [spelling.turn(turn) for turn in asked.turns]
        prompt = await self._host.rendered(version, turns, tools.listed)
        with about("tools" if tools.listed else "response_format"):
            await self._compiled(asked.like.json_schema)
        with about("messages"):
            answers = await begin([partial(self._host.begin, version, prompt, like) for like in asked.choices()])
        return [
            OnWay(
                index=at,
                answer=answer,
                reading=Reading(tools, form, short_ids=spelling.short_ids),
                stop=asked.like.stop,
                logprobs=asked.like.logprobs is not None,
                again=at > 0,
            )
            for at, answer in enumerate(answers)
        ]

    async def _form(self, asked: Chat, version: Version | None) -> tuple[Form | None, Spelling]:
        """How calls are written, and how they are handed to the template. Raises DataError where they would not be in
        the prompt."""
        if not asked.tools.listed and not any("tool_calls" in turn for turn in asked.turns):
            return None, Spelling()
        rendering = self._host.engine.rendering(version)
        tokenizer = self._host.engine.tokenizer
        found = await asyncio.to_thread(shown, tokenizer, rendering)
        form = await asyncio.to_thread(form_of, found, tokenizer) if asked.tools.choice == "auto" else None
        return form, found.spelling

    async def _begin_text(self, asked: Text) -> list[OnWay]:
        version = await self._find(asked.model)
        with about("prompt"):
            encoded = [await self._host.encoded(prompt) for prompt in asked.prompts]
            each_ids = [(ids, like) for ids in encoded for like in asked.choices()]
            answers = await begin([partial(self._host.begin, version, *given) for given in each_ids])
        return [
            OnWay(
                index=at,
                answer=answer,
                reading=Reading(_NO_TOOLS, None),
                logprobs=asked.like.logprobs is not None,
                again=at % asked.n > 0,
                before=self._words(asked.prompts[at // asked.n]) if asked.echo else "",
            )
            for at, answer in enumerate(answers)
        ]

    async def _find(self, model: str) -> Version | None:
        """What answers now. What can be no name of a version is not served, as any other unknown name."""
        try:
            return await self._host.find(model)
        except AdapterNotFound:
            raise
        except RegistryError as error:
            if _is_reference(model):
                raise
            raise Refused(404, str(error), param="model", code="model_not_found") from error

    async def _compiled(self, schema: Mapping[str, Any] | None) -> None:
        """Compile a schema beforehand, one at a time: the threads that begin answers wait for none then."""
        if schema is not None:
            compiling = partial(Grammar.of, schema, self._host.engine.tokenizer)
            await asyncio.get_running_loop().run_in_executor(self._compiles, compiling)

    def _words(self, prompt: str | tuple[int, ...]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._host.engine.tokenizer.decode(list(prompt), skip_special_tokens=False)

    # ---- tell

    async def _whole(self, asked: Asked, flight: Flight) -> dict[str, Any]:
        choices = {item.index: item.choice async for item in flight.news() if isinstance(item, Ended)}
        write = chat_choice if isinstance(asked, Chat) else text_choice
        tokenizer = self._host.engine.tokenizer
        written = [
            await _written(partial(write, at, choices[at], tokenizer), len(choices[at].scores or ()))
            for at in sorted(choices)
        ]
        return self._head(asked, flight).whole(written, usage(flight.prompt_tokens, flight.tokens))

    async def _events(self, asked: Asked, flight: Flight) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks(asked, flight):
                yield chunk
        except Exception as error:
            flight.end("failed")
            yield event(failure_of(error).body)
            if not isinstance(error, PeftkitError | Refused):
                raise

    async def _chunks(self, asked: Asked, flight: Flight) -> AsyncIterator[bytes]:
        head, tokenizer = self._head(asked, flight), self._host.engine.tokenizer
        tellers = {each.index: Teller(each.index, tokenizer, chat=head.chat) for each in flight.answers}
        for each in flight.answers:
            if head.chat:
                yield head.chunk(chat_delta(each.index, {"role": "assistant", "content": ""}))
            elif each.before:
                yield head.chunk(text_delta(each.index, each.before))
        async for item in flight.news():
            teller = tellers[item.index]
            if isinstance(item, Piece):
                yield head.chunk(await _written(partial(teller.piece, item.text, item.scores), len(item.scores)))
                continue
            if item.rest:
                yield head.chunk(teller.piece(item.rest))
            if item.choice.calls:
                yield head.chunk(chat_delta(item.index, call_deltas(item.choice.calls)))
            yield head.chunk(await _written(partial(teller.end, item.choice), len(item.choice.untold or ())))
        if asked.usage:
            yield head.chunk(usage=usage(flight.prompt_tokens, flight.tokens))
        yield DONE

    def _head(self, asked: Asked, flight: Flight) -> Head:
        model = flight.reference or self._host.base
        return Head.of(model, self._host.fingerprint, chat=isinstance(asked, Chat))


class _Stream(StreamingResponse):
    """Server-sent events; when whoever reads them leaves, the answers are stopped."""

    def __init__(self, events: AsyncIterator[bytes], flight: Flight) -> None:
        super().__init__(events, headers=_STREAMED, media_type="text/event-stream")
        self._flight = flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._flight.end("cancelled")


async def _written(write: Callable[[], T], scores: int) -> T:
    """What `write` gives; apart from the event loop where it decodes many tokens, up to 86,016 in an answer."""
    return await asyncio.to_thread(write) if scores > _AT_ONCE else write()


def _is_reference(model: str) -> bool:
    with suppress(RegistryError):
        parse_reference(model)
        return True
    return False


def _model(name: str, since: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(since), "owned_by": "peftkit"}
