"""One answer of vLLM: its tokens become text, end and log-probabilities here, as our own engine's do.

vLLM is told which tokens end an answer; stop strings it is not told of. Its text is not read: two decoders, two rules
for what belongs before a stop string.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx2

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import GenerationError, PeftkitError
from peftkit.generation.requests import Completion, Finish, Logprob, Request
from peftkit.generation.text import Text
from peftkit.serving.vllm.client import events


def asked(request: Request, model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """A request as vLLM's /v1/completions takes it."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed if sampling.seed < 2**63 else sampling.seed - 2**64,  # vLLM takes 64 bits with a sign
        "ignore_eos": True,  # what ends an answer stands in the next line, whatever the base's config says
        "stop_token_ids": _stops(request, tokenizer),
        "return_token_ids": True,
    }
    if request.logprobs is not None:
        body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    if request.json_schema is not None:
        body["structured_outputs"] = {"json": dict(request.json_schema)}
    return body


class VllmAnswer:
    """A stream of vLLM's on its way."""

    def __init__(
        self,
        reference: str | None,
        request: Request,
        tokenizer: Tokenizer,
        response: httpx2.Response,
        ended: Callable[[VllmAnswer], None],
    ) -> None:
        """`ended` is called once."""
        self.reference = reference
        self.prompt_tokens = len(request.prompt)
        self._request, self._response, self._ended = request, response, ended
        self._stops = frozenset(_stops(request, tokenizer))
        self._text = Text(tokenizer, request.stop)
        self._ids: list[int] = []
        self.scored: list[Logprob] = []
        """Log-probabilities of the tokens of all pieces so far, where they were asked for."""
        self._logprobs: list[Logprob] = []
        self._finish: Finish | None = None
        self._error: PeftkitError | None = None
        self._pieces: deque[tuple[str, int]] = deque()
        self._news = asyncio.Event()
        self._reading = self._cancelled = False
        self.task = asyncio.create_task(self._read())
        """Done when the answer is."""
        self.task.add_done_callback(lambda _: self._news.set())

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, each piece once. Raises what went wrong with it."""
        while True:
            self._news.clear()
            over = self.task.done()
            if self._pieces:
                piece, told = "".join(text for text, _ in self._pieces), self._pieces[-1][1]
                self._pieces.clear()
                self.scored += self._logprobs[len(self.scored) : told]
                yield piece
            elif over:
                break
            else:
                await self._news.wait()
        self._check()

    async def whole(self) -> Completion:
        """The answer, once it has ended. Raises what went wrong with it."""
        await asyncio.wait([self.task])
        self._check()
        return Completion(
            text=self._text.text,
            ids=self._ids,
            stopped=self._finish == "stop",
            finish=self._finish or "failed",
            adapter=self.reference,
            logprobs=tuple(self._logprobs),
        )

    def cancel(self) -> None:
        """Stop it, if it has not ended: vLLM ends what nobody reads any more."""
        if not self._cancelled and self._finish is None:
            self._cancelled = True
            if self._reading:  # a task that is cancelled before its first step would never close its stream
                self.task.cancel()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _read(self) -> None:
        self._reading = True
        try:
            if self._cancelled:
                raise asyncio.CancelledError
            async for chunk in events(self._response):
                for choice in chunk["choices"]:
                    self._take(choice)
                if self._finish is not None:
                    break
            else:
                self._error = GenerationError("vLLM ended a stream without an end of the answer")
        except asyncio.CancelledError:
            self._finish = "cancelled"
        except PeftkitError as error:
            self._error = error
        except Exception as error:  # an answer that is none of vLLM's: whoever waits must hear of it
            self._error = GenerationError(f"vLLM's answer cannot be read: {type(error).__name__}: {error}")
        if self._error is not None:
            self._finish = "failed"
        self._push(self._text.finish())
        try:
            await self._response.aclose()
        finally:
            self._ended(self)

    def _take(self, choice: Mapping[str, Any]) -> None:
        """The next tokens; what comes after the end of the answer is not looked at."""
        tokens, scores = choice.get("token_ids") or [], choice.get("logprobs")
        for at, token in enumerate(tokens):
            if token in self._stops:
                self._finish = "stop"
                return
            if scores is not None and self._request.logprobs is not None:
                self._logprobs.append(_logprob(token, scores, at, self._request.logprobs))
            self._ids.append(token)
            self._push(self._text.add(token))
            if self._text.stopped:
                self._finish = "stop"
                return
        reason = choice.get("finish_reason")
        if reason in ("stop", "length"):
            self._finish = reason
        elif reason is not None:
            raise GenerationError(f"vLLM ended the answer: {reason}")

    def _push(self, piece: str) -> None:
        if piece:
            self._pieces.append((piece, len(self._logprobs)))
            self._news.set()


def _stops(request: Request, tokenizer: Tokenizer) -> list[int]:
    return list(dict.fromkeys((*tokenizer.stop_ids, *request.stop_ids)))


def _logprob(token: int, scores: Mapping[str, Any], at: int, count: int) -> Logprob:
    """vLLM gives the chosen token first, and then the likeliest: one more than was asked for, when it is not theirs."""
    given = {int(name.removeprefix("token_id:")): value for name, value in scores["top_logprobs"][at].items()}
    likeliest = sorted(given.items(), key=lambda each: -each[1])[:count]
    return Logprob(token, float(scores["token_logprobs"][at]), tuple(likeliest))
