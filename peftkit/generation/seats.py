"""What the engine needs to know about adapters: which model computes a row, and under which slot of its bank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from peftkit.generation.bank.layout import NO_SLOT


class Computes(Protocol):
    """A model that rows of several adapters may share: a bank, or one adapter's own model."""

    def seated(self, slots: Sequence[int], length: int) -> AbstractContextManager[Any]:
        """What to call for a batch of rows of `length` tokens, row i answered by slot i."""
        ...


@dataclass(frozen=True)
class Seat:
    """Where the rows of one adapter are computed."""

    model: Computes
    """Rows with the same one go through it together."""
    slot: int
    digest: str
    """What computes, by content: keys and values are shared between prompts of one digest only."""
    reference: str | None = None
    """`name@version`; None is the base."""


class Adapters(Protocol):
    """Gives seats to requests."""

    def identify(self, name: str | None) -> Any:
        """What `name` means now (a version, or None for the base): asked once, when a request is submitted, so that an
        answer belongs to one version. Raises PeftkitError for a name that cannot be answered."""
        ...

    def seat(self, identity: Any) -> Seat | None:
        """A seat that stays until it is released; None while all are taken. Raises PeftkitError when it cannot be
        loaded."""
        ...

    def release(self, seat: Seat) -> None:
        """Give a seat back; each is released as often as it was given."""
        ...


@dataclass(frozen=True)
class Alone:
    """One model for every row: an adapter that is being trained, or one that no bank can hold."""

    model: Any

    def seated(self, slots: Sequence[int], length: int) -> AbstractContextManager[Any]:
        """The model, whatever the slots are."""
        return nullcontext(self.model)


class One:
    """The one model there is answers everything."""

    def __init__(self, model: Any) -> None:
        self._seat = Seat(Alone(model), NO_SLOT, digest="")

    def identify(self, name: str | None) -> None:
        """Names mean nothing here."""

    def seat(self, identity: None) -> Seat:
        """The model's."""
        return self._seat

    def release(self, seat: Seat) -> None:
        """Nothing is given back."""


__all__ = ["NO_SLOT", "Adapters", "Alone", "Computes", "One", "Seat"]
