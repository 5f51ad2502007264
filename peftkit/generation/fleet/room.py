"""Who lies in the bank or has a model of its own, who must go for another one, and how large the stacks have to be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from peftkit.errors import TuningError
from peftkit.generation.bank.bank import Bank
from peftkit.generation.seats import Seat
from peftkit.registry.store import Version


@dataclass(frozen=True)
class Need:
    """What one adapter takes."""

    ranks: Mapping[str, int] | None
    """Its rank for each linear layer in the bank; None: it has a model of its own."""
    own: int = 0
    """Bytes of that model's tensors that the base does not have."""


@dataclass
class Resident:
    """An adapter that can answer."""

    version: Version
    need: Need
    seat: Seat
    users: int = 0
    """How many seats were given and not given back."""


class Room:
    """Slots and bytes for adapters. Stacks never take more than `memory` together with what lies beside the bank."""

    def __init__(self, bank: Bank, memory: int | None) -> None:
        self.bank, self.memory = bank, memory

    def used(self, residents: Collection[Resident]) -> int:
        """Bytes held now."""
        return self.bank.bytes + sum(resident.need.own for resident in residents)

    def least(self, residents: Collection[Resident], need: Need, *, idle: bool = False) -> int:
        """Bytes that these and one more take in the smallest stacks; `idle`: once nobody uses them."""
        slots, ranks = self._tight(residents, need, idle=idle)
        return self.bank.bytes_for(slots, ranks) + need.own + sum(resident.need.own for resident in residents)

    def fits(self, residents: Collection[Resident], need: Need, *, idle: bool = False) -> bool:
        """Whether one more can be beside these."""
        if len(self._alike(residents, need)) >= self.bank.most:
            return False
        return self.memory is None or self.least(residents, need, idle=idle) <= self.memory

    def victims(
        self, residents: Sequence[Resident], need: Need, held: Callable[[Resident], bool]
    ) -> list[Resident] | None:
        """Who must go for one more, the first of `residents` before the others; None while that does not suffice.

        Those that `held` names stay, as do those in use.
        """
        if self.fits(residents, need):
            return []
        free = [resident for resident in residents if not resident.users and not held(resident)]
        kept = [resident for resident in residents if resident.users or held(resident)]
        if not self.fits(kept, need):
            return None
        go = next(count for count in range(1, len(free) + 1) if self.fits([*kept, *free[count:]], need))
        kept, chosen = [*kept, *free[go:]], []
        for resident in reversed(free[:go]):  # some went in vain: a model of its own frees no slot
            if self.fits([*kept, resident], need):
                kept.append(resident)
            else:
                chosen.append(resident)
        return chosen[::-1]

    def too_small(self, version: Version, need: Need, held: Collection[Resident]) -> TuningError:
        """The error for one that finds no room even when only those who are held are left."""
        names = ", ".join(resident.version.reference for resident in held) or "nothing"
        if self.memory is None or len(self._alike(held, need)) >= self.bank.most:
            return TuningError(
                f"{version.reference} finds no place: all {self.bank.most} are pinned ({names})",
                expected="a place that is not pinned",
                hint="unpin one of them, or allow more slots",
            )
        return TuningError(
            f"{version.reference} and what is pinned ({names}) take {self.least(held, need, idle=True)} bytes, "
            f"and adapters may take {self.memory}",
            expected="an adapter that fits into the memory",
            hint="allow adapters more memory, pin fewer, or use a smaller rank",
        )

    def make(self, residents: Collection[Resident], need: Need) -> int:
        """Size the stacks for one more, who must fit; returns the slot for it.

        They grow as far as they may, slots by doubling, and become small again when half of them is for nobody, or
        when the memory is needed. Nobody who is in use is moved.
        """
        slot = self._free(residents)
        if need.ranks is None:
            if not self._within(self.bank.slots, self.bank.ranks, residents, need):
                self._tighten(residents, need)
            return slot
        slots, ranks = max(self.bank.slots, self._doubled(slot + 1)), _widest([self.bank.ranks, need.ranks])
        wasted = 2 * self.bank.bytes_for(*self._tight(residents, need)) <= self.bank.bytes_for(slots, ranks)
        if wasted and self.bank.bytes_for(slots, ranks) > self.bank.bytes_for(*self._rounded(residents, need)):
            return self._tighten(residents, need)
        if not self._within(slots, ranks, residents, need):
            return self._tighten(residents, need)
        self.bank.resize(slots, ranks)
        return slot

    def _tighten(self, residents: Collection[Resident], need: Need) -> int:
        """Move whoever is not in use to the lowest slots, and cut the stacks to what is needed."""
        idle = [resident for resident in residents if resident.need.ranks is not None and not resident.users]
        for resident in sorted(idle, key=lambda resident: -resident.seat.slot):
            slot = self._free(residents)
            if slot < resident.seat.slot:
                self.bank.move(resident.seat.slot, slot)
                resident.seat = replace(resident.seat, slot=slot)
        slots, ranks = self._rounded(residents, need)
        if not self._within(slots, ranks, residents, need):
            slots, ranks = self._tight(residents, need)
        self.bank.resize(slots, ranks)
        return self._free(residents)

    def _tight(self, residents: Collection[Resident], need: Need, *, idle: bool = False) -> tuple[int, dict[str, int]]:
        """The fewest slots and the smallest ranks for these and one more; whoever is in use keeps the slot."""
        inside = [resident for resident in residents if resident.need.ranks is not None]
        fixed = [resident.seat.slot + 1 for resident in inside if resident.users and not idle]
        slots = max([len(inside) + (need.ranks is not None), *fixed])
        shapes = [resident.need.ranks for resident in inside if resident.need.ranks is not None]
        return slots, _widest(shapes if need.ranks is None else [*shapes, need.ranks])

    def _rounded(self, residents: Collection[Resident], need: Need) -> tuple[int, dict[str, int]]:
        slots, ranks = self._tight(residents, need)
        return self._doubled(slots), ranks

    def _within(self, slots: int, ranks: Mapping[str, int], residents: Collection[Resident], need: Need) -> bool:
        own = need.own + sum(resident.need.own for resident in residents)
        return self.memory is None or self.bank.bytes_for(slots, ranks) + own <= self.memory

    def _doubled(self, slots: int) -> int:
        """The next power of two, as many as there may be at most."""
        return min(self.bank.most, 1 << (slots - 1).bit_length()) if slots else 0

    def _alike(self, residents: Collection[Resident], need: Need) -> list[Resident]:
        """Those who take what is counted together: slots, or models."""
        return [resident for resident in residents if (resident.need.ranks is None) == (need.ranks is None)]

    def _free(self, residents: Collection[Resident]) -> int:
        """The lowest slot that nobody has."""
        taken = {resident.seat.slot for resident in residents if resident.need.ranks is not None}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)


def _widest(shapes: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each layer; shapes that are one object count once."""
    widest: dict[str, int] = {}
    for ranks in {id(ranks): ranks for ranks in shapes}.values():
        for path, rank in ranks.items():
            if rank > widest.get(path, 0):
                widest[path] = rank
    return widest
