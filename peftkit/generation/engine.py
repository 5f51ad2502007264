"""Continuous batching: requests of any adapters join and leave between steps, and every step serves all of them.

One thread drives the engine (`step`, `run`, `stream`); requests may be submitted and cancelled from any thread. Why it
is a loop of its own over the model's forward, and not transformers' continuous batching: docs/decisions/0016.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Literal

import torch

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import EngineBusy, GenerationError
from peftkit.generation.check import check
from peftkit.generation.choose import UNDECIDED, choose_all
from peftkit.generation.constrain import Grammar
from peftkit.generation.forward import autocast
from peftkit.generation.lanes import Lane, Scored, lane_for
from peftkit.generation.limits import Limits
from peftkit.generation.memory import CacheMemory
from peftkit.generation.prefixes import WORTH_SHARING, Prefixes, common
from peftkit.generation.requests import Completion, Finish, Request
from peftkit.generation.running import Row, Ticket
from peftkit.generation.seats import Adapters, Computes, Seat


class Engine:
    """Answers requests over whatever adapters `adapters` gives seats to."""

    def __init__(
        self,
        adapters: Adapters,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        vocabulary: int,
        compute_dtype: torch.dtype = torch.float32,
        positions: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`vocabulary` is the number of logits, `positions` the most tokens that a row may have."""
        self.limits = limits or Limits()
        self.passes = 0
        """Forward passes so far."""
        self._adapters, self._tokenizer, self._device = adapters, tokenizer, device
        self._vocabulary, self._positions, self._compute_dtype = vocabulary, positions, compute_dtype
        self._prefixes = Prefixes(self.limits.prefix_bytes)
        self._memory = CacheMemory(self.limits.cache_bytes, device)
        self._lanes: dict[int, tuple[Computes, Lane]] = {}
        self._waiting: deque[Ticket] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, request: Request) -> Ticket:
        """Queue a request. What its adapter's name means is settled now.

        Raises ConfigError or GenerationError for a request that cannot be answered, EngineBusy when the queue is full
        or closed, and what the adapters raise for a name.
        """
        check(request, self._vocabulary, self._positions)
        schema = request.json_schema
        grammar = Grammar.of(schema, self._tokenizer) if schema is not None else None
        ticket = Ticket(request, self._adapters.identify(request.adapter), grammar)
        with self._lock:
            if self._closed:
                raise EngineBusy("the engine takes no more requests", expected="a request before it was closed")
            if self.limits.waiting is not None:
                seated = self._seated_now()
                self.limits.check_room(len(seated), sum(id(each) not in seated for each in self._waiting))
            self._waiting.append(ticket)
        return ticket

    def step(self) -> bool:
        """Let requests join, go on with the answers of every model, let them leave; whether anything is left to do.

        What goes wrong with one model ends the answers that it was computing, with the error, and no others.
        """
        with torch.inference_mode(), autocast(self._device, self._compute_dtype):
            self._drop_cancelled()
            self._admit()
            for _, lane in list(self._lanes.values()):
                before = lane.passes
                self._advance(lane)
                self.passes += lane.passes - before
        self._lanes = {key: (model, lane) for key, (model, lane) in self._lanes.items() if lane.rows}
        return bool(self._lanes or self._waiting)

    def run(self) -> None:
        """Answer everything that was submitted."""
        while self.step():
            pass

    def stream(self, ticket: Ticket) -> Iterator[str]:
        """The text of an answer as it comes, in a program of one thread; other requests go on beside it."""
        while not ticket.done:
            self.step()
            if piece := ticket.take():
                yield piece
        if piece := ticket.take():
            yield piece

    def close(self) -> None:
        """Take no more requests; those that were taken are still answered (`run`)."""
        with self._lock:
            self._closed = True

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(len(lane.rows) for _, lane in list(self._lanes.values()))

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def _admit(self) -> None:
        """Give rows to those who wait, first come first served, as long as there is room."""
        with self._lock:
            waiting = tuple(self._waiting)
        seated = self._seated_now()
        for ticket in waiting:  # they count as waiting until they have a row: the queue is bounded by them
            if id(ticket) in seated:  # an interrupt came between getting a row and leaving the queue
                self._take_out(ticket)
                continue
            if self.running >= self.limits.rows:
                break
            try:
                refused = self._seated(ticket)
            except Exception as error:
                self._take_out(ticket)
                self._fail_unseated(ticket, error)
                continue
            if refused is None:
                self._take_out(ticket)
            elif refused == "no room":
                break  # nobody overtakes it, or it might wait for ever

    def _seated_now(self) -> set[int]:
        """The `id` of every ticket that has a row; one that has just got it may still stand in the queue."""
        return {id(row.ticket) for _, lane in list(self._lanes.values()) for row in list(lane.rows)}

    def _seated(self, ticket: Ticket) -> Literal["no room", "read later"] | None:
        """Begin a row; or say that there is no seat or no memory, or that its beginning is just being read."""
        seat = self._adapters.seat(ticket.identity)
        if seat is None:
            return "no room"
        refused: Literal["no room", "read later"] | None = None
        prompt = ticket.request.prompt
        try:
            lane = self._lane(seat)
            begun = self._prefixes.longest(seat.digest, prompt)
            if self._being_read(lane, seat, prompt, begun[1] if begun else 0):
                refused = "read later"
            elif not self._fits(lane, seat, ticket):
                refused = "no room"
            else:
                lane.join(Row.begin(ticket, seat, self._tokenizer, self._room(lane, ticket)), begun)
        except BaseException:
            self._adapters.release(seat)
            raise
        if refused is not None:
            self._adapters.release(seat)
        return refused

    def _room(self, lane: Lane, ticket: Ticket) -> int:
        """How many tokens the base's positions leave for an answer. Raises GenerationError when none."""
        if self._positions is None:
            return ticket.request.max_new_tokens
        prompt = len(ticket.request.prompt)
        if (room := self._positions - lane.virtual_tokens - prompt) < 1:
            raise GenerationError(
                f"the prompt has {prompt} tokens, and the adapter puts {lane.virtual_tokens} before it",
                expected=f"fewer than the base's {self._positions} positions in all",
            )
        return room

    def _being_read(self, lane: Lane, seat: Seat, prompt: tuple[int, ...], known: int) -> bool:
        """Whether a row is reading more of the beginning of this prompt than is known: it need not be read twice.

        Only if it will be there to be taken: from the row, unless it ends at once, or from what is kept.
        """
        known = max(known, lane.begun_alike(seat.digest, prompt), WORTH_SHARING - 1)
        reading = [row for row in lane.rows if row.seat.digest == seat.digest and row.pending and not row.generated]
        lasting = [row for row in reading if row.limit > 1 or self._prefixes.holds(len(row.ticket.request.prompt))]
        return any(common(row.ticket.request.prompt, prompt[:-1]) > known for row in lasting)

    def _fits(self, lane: Lane, seat: Seat, ticket: Ticket) -> bool:
        """Whether keys and values of one more row stay within the limit, where that takes it without room to spare.

        Raises GenerationError if they never can.
        """
        tokens = len(ticket.request.prompt) + ticket.request.max_new_tokens
        joining = {other: 0 for _, other in self._lanes.values()} | {lane: min(tokens, self._positions or tokens)}
        return self._memory.make_room(joining, seat)

    def _lane(self, seat: Seat) -> Lane:
        known = self._lanes.get(id(seat.model))
        if known is None:
            known = seat.model, lane_for(seat.model, self._device, self._tokenizer.pad_id, self.limits.rows)
            self._lanes[id(seat.model)] = known
        return known[1]

    def _advance(self, lane: Lane) -> None:
        try:
            self._take(lane, lane.decode())
            begun = lane.read(self.limits.prompt_tokens)
            for row in begun.rows:
                self._remember(lane, row)
            self._take(lane, begun)
        except Exception as error:
            for row in lane.empty():
                if not row.ticket.done:
                    self._adapters.release(row.seat)
                    row.close("failed", error)

    def _take(self, lane: Lane, scored: Scored) -> None:
        """Choose the next token of every row; what goes wrong with one ends that one."""
        if not scored.rows:
            return
        masks: list[torch.Tensor | None] = []
        failed: dict[int, Exception] = {}
        for i, row in enumerate(scored.rows):
            try:
                masks.append(row.constraint.mask(scored.logits.shape[1]) if row.constraint is not None else None)
            except Exception as error:
                masks.append(None)
                failed[i] = error
        tokens = choose_all(scored.logits, [row.chooser for row in scored.rows], masks)
        for i, (row, token) in enumerate(zip(scored.rows, tokens, strict=True)):
            try:
                if i in failed:
                    raise failed[i]
                if token == UNDECIDED:
                    raise GenerationError("the model gives no number for any next token")
                row.accept(token, scored.logits[i])
            except Exception as error:
                self._leave(lane, row, "failed", error)
            else:
                if row.finish is not None:
                    self._leave(lane, row, row.finish)

    def _remember(self, lane: Lane, row: Row) -> None:
        """Keep what a row has read for prompts that begin alike."""
        tokens = tuple(row.tokens[: row.read])
        wanted = self.limits.prefix_bytes > 0 and len(tokens) >= WORTH_SHARING and self._prefixes.holds(len(tokens))
        if wanted and not self._prefixes.has(row.seat.digest, tokens):
            try:
                kept = lane.copy_of(row)
            except torch.OutOfMemoryError:
                return  # nobody waits for it
            if kept is not None:
                self._prefixes.keep(row.seat.digest, tokens, kept)

    def _leave(self, lane: Lane, row: Row, finish: Finish, error: BaseException | None = None) -> None:
        if finish in ("stop", "length"):
            self._remember(lane, row)  # the next turn of the conversation begins with it
        try:
            lane.leave(row)
        finally:
            self._adapters.release(row.seat)
            row.close(finish, error)

    def _drop_cancelled(self) -> None:
        for _, lane in self._lanes.values():
            for row in [row for row in lane.rows if row.ticket.cancelled]:
                self._leave(lane, row, "cancelled")
        kept: deque[Ticket] = deque()
        cancelled: list[Ticket] = []
        with self._lock:
            for ticket in self._waiting:  # asked once each: another thread may cancel it meanwhile
                (cancelled if ticket.cancelled else kept).append(ticket)
            self._waiting = kept
        for ticket in cancelled:
            ticket.close(Completion("", [], stopped=False, finish="cancelled", adapter=ticket.reference))

    def _fail_unseated(self, ticket: Ticket, error: Exception) -> None:
        failed = Completion("", [], stopped=False, finish="failed", adapter=ticket.reference, error=str(error))
        ticket.close(failed, error)

    def _take_out(self, ticket: Ticket) -> None:
        with self._lock:
            self._waiting.remove(ticket)
