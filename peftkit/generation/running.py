"""One answer while it is generated, and what its asker holds of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftkit.base.tokenizer import Tokenizer
from peftkit.generation.choose import Chooser, logprobs
from peftkit.generation.constrain import Constraint, Grammar
from peftkit.generation.requests import Completion, Finish, Logprob, Request
from peftkit.generation.seats import Seat
from peftkit.generation.text import Text


class Ticket:
    """What `submit` gives back: the answer as it comes. May be read and cancelled from any thread."""

    def __init__(self, request: Request, identity: Any, grammar: Grammar | None = None) -> None:
        self.request, self.grammar = request, grammar
        self.identity = identity
        """What answers: fixed when the request was submitted."""
        self.reference: str | None = getattr(identity, "reference", None)
        """`name@version` of what answers; None is the base."""
        self.completion: Completion | None = None
        """The answer, once it is whole."""
        self.error: BaseException | None = None
        """Why it failed, when it did."""
        self.cancelled = False
        self.scored: list[Logprob] = []
        """Log-probabilities of the tokens of all text that was taken, where they were asked for."""
        self._pieces: deque[tuple[str, Sequence[Logprob]]] = deque()
        self._held: list[Logprob] = []
        self._done = threading.Event()
        self._told: Callable[[], None] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Stop before the next step; what was generated so far becomes the completion."""
        self.cancelled = True

    def take(self) -> str:
        """The text that has come since the last call."""
        pieces = []
        while self._pieces:
            piece, scores = self._pieces.popleft()
            pieces.append(piece)
            self.scored += scores
        return "".join(pieces)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until another thread's engine is done with it; whether it is."""
        return self._done.wait(seconds)

    def listen(self, told: Callable[[], None]) -> None:
        """Have `told` called in the engine's thread when text has come, and when the answer has ended; and once now,
        because both may have happened already. It must not raise."""
        self._told = told
        told()

    def push(self, piece: str, scores: Sequence[Logprob] = ()) -> None:
        """Add text that is certain, and log-probabilities of tokens; those of tokens whose text is not certain wait for
        it."""
        self._held += scores
        if piece:
            self._pieces.append((piece, self._held))
            self._held = []
            if told := self._told:
                told()

    def close(self, completion: Completion, error: BaseException | None = None) -> None:
        """Nothing more will come. Only the first call counts."""
        if self.done:
            return
        self.completion, self.error = completion, error
        self._done.set()
        if told := self._told:
            told()


@dataclass(eq=False)
class Row:
    """An answer on its way: which tokens there are, and how many of them the model has read."""

    ticket: Ticket
    seat: Seat
    text: Text
    chooser: Chooser
    stop_ids: frozenset[int]
    limit: int
    """How many tokens may be generated."""
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    """The prompt and what was generated."""
    read: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    finish: Finish | None = None

    @classmethod
    def begin(cls, ticket: Ticket, seat: Seat, tokenizer: Tokenizer, room: int) -> Row:
        """A row for a request; `room` is how many tokens the model's positions leave for its answer."""
        request = ticket.request
        grammar = ticket.grammar
        return cls(
            ticket=ticket,
            seat=seat,
            text=Text(tokenizer, request.stop),
            chooser=Chooser(request.sampling),
            stop_ids=frozenset((*tokenizer.stop_ids, *request.stop_ids)),
            limit=min(request.max_new_tokens, room),
            constraint=grammar.start(request.stop_ids) if grammar is not None else None,
            tokens=list(request.prompt),
        )

    @property
    def pending(self) -> int:
        """How many tokens the model has not read: one for a row that is being answered."""
        return len(self.tokens) - self.read

    @property
    def most(self) -> int:
        """How many tokens there will be at most."""
        return len(self.ticket.request.prompt) + self.limit

    @property
    def generated(self) -> list[int]:
        """The answer's tokens so far."""
        return self.tokens[len(self.ticket.request.prompt) :]

    def accept(self, token: int, logits: torch.Tensor) -> None:
        """Take the next token, chosen from `logits` of shape (vocabulary,); the last one sets `finish`."""
        if token in self.stop_ids:
            self.finish = "stop"
            return
        request = self.ticket.request
        scores = [logprobs(logits, token, request.logprobs)] if request.logprobs is not None else []
        self.logprobs += scores
        if self.constraint is not None:
            self.constraint.accept(token)
        self.tokens.append(token)
        self.ticket.push(self.text.add(token), scores)
        if self.text.stopped or (self.constraint is not None and self.constraint.done):
            self.finish = "stop"
        elif len(self.generated) >= self.limit:
            self.finish = "length"

    def close(self, finish: Finish, error: BaseException | None = None) -> None:
        """Hand the answer over."""
        try:
            self.ticket.push(self.text.finish())
        except Exception as fault:  # a tokenizer that cannot decode what there is: whoever waits must hear of it
            finish, error = "failed", error or fault
        self.ticket.close(
            Completion(
                text=self.text.text,
                ids=self.generated,
                stopped=finish == "stop",
                finish=finish,
                adapter=self.seat.reference,
                logprobs=tuple(self.logprobs),
                error=None if error is None else str(error),
            ),
            error,
        )
