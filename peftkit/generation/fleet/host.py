"""Factors in host memory: what was used last stays, within so many bytes."""

from __future__ import annotations

from collections import OrderedDict

from peftkit.generation.bank.bank import Factors


class HostMemory:
    """Factors of adapters by version id, least recently put first out."""

    def __init__(self, most: int) -> None:
        """`most` is in bytes."""
        self.most = most
        self._kept: OrderedDict[str, tuple[Factors, int]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(size for _, size in self._kept.values())

    @property
    def ids(self) -> tuple[str, ...]:
        """Whose factors are held, the next to go first."""
        return tuple(self._kept)

    def has_room_for(self, size: int) -> bool:
        """Whether so many bytes could be held, with others put out."""
        return size <= self.most

    def put(self, version_id: str, factors: Factors) -> None:
        """Hold factors, others put out for them; not at all when they are larger than what may be held."""
        size = bytes_of(factors)
        if not self.has_room_for(size):
            return
        self._kept.pop(version_id, None)
        while self._kept and self.bytes + size > self.most:
            self._kept.popitem(last=False)
        self._kept[version_id] = factors, size

    def get(self, version_id: str) -> Factors | None:
        """The factors of a version; None when they are not here."""
        return self._kept[version_id][0] if version_id in self._kept else None

    def drop(self, version_id: str) -> None:
        """Let go of a version's factors, if they are here."""
        self._kept.pop(version_id, None)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()


def bytes_of(factors: Factors) -> int:
    """Bytes of factors as they are held."""
    return sum(right.nbytes + left.nbytes for right, left in factors.values())
