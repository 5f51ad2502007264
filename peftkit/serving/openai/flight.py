"""The answers to one request while they are on their way: begun together, followed together, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from peftkit.base.tokenizer import Tokenizer
from peftkit.serving.answering import Answer
from peftkit.serving.metrics import Watch
from peftkit.serving.openai.calls import Reading
from peftkit.serving.openai.failures import Draining, Refused
from peftkit.serving.openai.told import Choice

_ATTEMPTS = 8
"""Times to begin again because a name changed hands between two answers to one request."""
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
        """Of the answers that have ended."""
        self._tokenizer, self._watch, self._deadline = tokenizer, watch, deadline
        self._finishes: dict[int, str] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

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
                self.tokens += len(item.choice.completion.ids)
            self._watch.first()
            yield item

    def end(self, finish: str) -> None:
        """Stop what has not ended, and count the request: by its first answer when all have ended, or by `finish`.
        Only the first call counts."""
        for each in self.answers:
            each.answer.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        for task in self._tasks:
            task.cancel()
        if len(self._finishes) == len(self.answers):
            finish = self._finishes[self.answers[0].index]
        self._watch.ended(finish, self.prompt_tokens, self.tokens)

    async def _follow(self, each: OnWay, queue: asyncio.Queue[Piece | Ended | Exception]) -> None:
        given = []
        try:
            async for piece in each.answer.pieces():
                if text := each.reading.add(piece):
                    given.append(text)
                    queue.put_nowait(Piece(each.index, text))
            completion = await each.answer.whole()
            if completion.finish == "cancelled":  # by nobody here: whoever does so no longer listens
                raise Draining("the server shut down before the answer was whole")
            rest, calls = each.reading.finish(completion, self._tokenizer, each.stop)
            choice = Choice(completion, "".join([*given, rest]), calls, each.logprobs, each.before)
            queue.put_nowait(Ended(each.index, rest, choice))
        except Exception as error:
            queue.put_nowait(error)

    def _expire(self, queue: asyncio.Queue[Piece | Ended | Exception]) -> None:
        queue.put_nowait(self._deadline.over())
        self.end("cancelled")


async def begin(starts: Sequence[Callable[[], Awaitable[Answer]]], deadline: Deadline) -> list[Answer]:
    """Begin all answers to one request, with one version. Raises what the first raises that cannot begin; then, and
    when this is cancelled, those that have begun are stopped."""
    for _ in range(_ATTEMPTS):
        begun: list[Answer] = []
        try:
            async with asyncio.timeout_at(deadline.at) as clock:
                for start in starts:
                    begun.append(await start())
            if len({answer.reference for answer in begun}) == 1:
                return begun
        except BaseException as error:
            _stop(begun)
            if isinstance(error, TimeoutError) and clock.expired():
                raise deadline.over() from error
            raise
        _stop(begun)
    raise Refused(503, "the model changes all the time", type="server_error", headers={"Retry-After": "1"})


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


def _stop(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
