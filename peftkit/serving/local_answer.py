"""One answer of an engine of this process, as the event loop sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from peftkit.generation.answer import answered
from peftkit.generation.requests import Completion, Logprob
from peftkit.generation.running import Ticket


class LocalAnswer:
    """A ticket whose news cross from the engine's thread into the event loop; several pieces may come as one."""

    def __init__(self, ticket: Ticket, ended: Callable[[LocalAnswer], None]) -> None:
        """`ended` is called once, in the event loop that this is made in."""
        self._ticket, self._ended = ticket, ended
        self._loop = asyncio.get_running_loop()
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._told = False
        ticket.listen(self._tell)

    @property
    def reference(self) -> str | None:
        """`name@version` of what answers; None is the base."""
        return self._ticket.reference

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._ticket.request.prompt)

    @property
    def scored(self) -> Sequence[Logprob]:
        """Log-probabilities of the tokens of all pieces so far, where they were asked for."""
        return self._ticket.scored

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, each piece once. Raises what went wrong with it."""
        while True:
            self._news.clear()
            over = self._over.is_set()
            if piece := self._ticket.take():
                yield piece
            elif over:
                break
            else:
                await self._news.wait()
        answered(self._ticket)

    async def whole(self) -> Completion:
        """The answer, once it has ended. Raises what went wrong with it."""
        await self._over.wait()
        return answered(self._ticket)

    def cancel(self) -> None:
        """Stop it, if it has not ended."""
        self._ticket.cancel()

    def _tell(self) -> None:
        """In the engine's thread. One call into the loop is enough for all that came before it is made."""
        if not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._hear)
            except RuntimeError:  # the loop was closed under a server that did not drain: nobody waits any more
                self._ticket.cancel()

    def _hear(self) -> None:
        self._told = False
        self._news.set()
        if self._ticket.done and not self._over.is_set():
            self._over.set()
            self._ended(self)
