"""The answers to one request while they are on their way: begun together, followed together, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from peftkit.base.tokenizer import Tokenizer
from peftkit.generation.requests import Logprob
from peftkit.serving.answering import Answer
from peftkit.serving.metrics import Watch
from peftkit.serving.openai.calls import Reading
from peftkit.serving.openai.failures import Draining, Refused
from peftkit.serving.openai.told import Choice

T = TypeVar("T")


class Left(Exception):
    """The client has gone."""


@dataclass(frozen=True)
class Deadline:
    """When a request must have been answered."""

    seconds: float
    """After it was read."""
    at: float
    """The same, as a time of the event loop."""

    @classmethod
    def of(cls, seconds: float) -> Deadline:
        """So many seconds from now."""
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Raise Refused when the block takes longer."""
        try:
            async with asyncio.timeout_at(self.at) as clock:
                yield
        except TimeoutError as error:
            if clock.expired():
                raise self.over() from error
            raise

    def over(self) -> Refused:
        """What whoever asked is told then."""
        return Refused(
            504,
            f"the answer was cut off: it was not whole after {self.seconds:g} seconds",
            type="server_error",
            code="timeout",
            headers={"x-should-retry": "false"},  # OpenAI's client would ask for the same twice more
        )


@dataclass(frozen=True)
class OnWay:
    """One of the answers."""

    index: int
    answer: Answer
    reading: Reading
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    again: bool = False
    """Whether another one before it has the same prompt."""
    before: str = ""
    """The prompt, where the answer repeats it."""


@dataclass(frozen=True)
class Piece:
    """Text of one of the answers."""

    index: int
    text: str
    scores: Sequence[Logprob] = ()
    """Log-probabilities of the tokens that came with it, where they were asked for: text that may be the beginning of a
    call comes later than they do."""


@dataclass(frozen=True)
class Ended:
    """One of the answers has come to its end."""

    index: int
    rest: str
    """Text that was held back until then."""
    choice: Choice


class Flight:
    """All answers to one request; they are of one version."""

    def __init__(self, answers: Sequence[OnWay], tokenizer: Tokenizer, watch: Watch, deadline: Deadline) -> None:
        self.answers = answers
        self.prompt_tokens = sum(each.answer.prompt_tokens for each in answers if not each.again)
        self.tokens = 0
        """Of the answers that are not on their way any more."""
        self._tokenizer, self._watch, self._deadline = tokenizer, watch, deadline
        self._finishes: dict[int, str] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False

    @property
    def reference(self) -> str | None:
        """`name@version` of what answers; None is the base."""
        return self.answers[0].answer.reference

    async def news(self) -> AsyncIterator[Piece | Ended]:
        """Pieces and ends of all answers as they come. Raises the first thing that goes wrong with one of them, and
        Refused at the deadline."""
        queue: asyncio.Queue[Piece | Ended | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        # No timeout around the wait: a reader who takes nothing must not keep the rows either.
        self._alarm = loop.call_at(self._deadline.at, self._expire, queue)
        self._tasks = [loop.create_task(self._follow(each, queue)) for each in self.answers]
        while len(self._finishes) < len(self.answers):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Ended):
                self._finishes[item.index] = item.choice.finish
            self._watch.first()
            yield item

    def end(self, finish: str) -> None:
        """Stop what has not ended, and count the request: by its first answer when all have ended, or by `finish`.
        Only the first call counts."""
        self._over = True
        for each in self.answers:  # those who follow them come to their end by that, and count what there was
            each.answer.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        if len(self._finishes) == len(self.answers):
            finish = self._finishes[self.answers[0].index]
        self._watch.ended(finish, self.prompt_tokens, self.tokens)

    async def _follow(self, each: OnWay, queue: asyncio.Queue[Piece | Ended | Exception]) -> None:
        given, told = [], 0
        try:
            async for piece in each.answer.pieces():
                if text := each.reading.add(piece):
                    scores = each.answer.scored[told:]
                    queue.put_nowait(Piece(each.index, text, scores))
                    given.append(text)
                    told += len(scores)
            completion = await each.answer.whole()
            self._count(len(completion.ids))
            if self._over:
                return
            if completion.finish == "cancelled":  # by nobody here: whoever does so no longer listens
                raise Draining("the server shut down before the answer was whole")
            rest, calls = each.reading.finish(completion, self._tokenizer, each.stop)
            choice = Choice(completion, "".join([*given, rest]), calls, each.logprobs, each.before, told)
            queue.put_nowait(Ended(each.index, rest, choice))
        except Exception as error:
            queue.put_nowait(error)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self._over:
            self._watch.late(tokens)

    def _expire(self, queue: asyncio.Queue[Piece | Ended | Exception]) -> None:
        queue.put_nowait(self._deadline.over())
        self.end("cancelled")


async def begin(starts: Sequence[Callable[[], Awaitable[Answer]]]) -> list[Answer]:
    """Begin all answers to one request. Raises what the first raises that cannot begin; then, and when this is
    cancelled, those that have begun are stopped."""
    begun: list[Answer] = []
    try:
        for start in starts:
            begun.append(await start())
    except BaseException:
        for answer in begun:
            answer.cancel()
        raise
    return begun


async def unless_left(request: HttpRequest, work: Coroutine[Any, Any, T], undo: Callable[[T], None]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises Left then.

    A result that comes too late for that, or that nobody waits for any more, is given to `undo`.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Left
    except BaseException:
        task.cancel()
        task.add_done_callback(partial(_undone, undo))
        raise
    finally:
        left.cancel()
    return task.result()


def _undone(undo: Callable[[T], None], task: asyncio.Future[T]) -> None:
    if not task.cancelled() and task.exception() is None:
        undo(task.result())


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
