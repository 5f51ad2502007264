"""What a fleet of adapters has done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Misses:
    """Adapters that had to be loaded from one place."""

    count: int = 0
    seconds: float = 0.0
    """All of them together, as `bytes`."""
    bytes: int = 0

    def plus(self, seconds: float, size: int) -> Misses:
        """With one more."""
        return Misses(self.count + 1, self.seconds + seconds, self.bytes + size)


@dataclass(frozen=True)
class Statistics:
    """What a fleet has done, and who is where."""

    hits: int = 0
    """Seats of adapters that were there; a request that waits for a row asks for one at every step."""
    from_host: Misses = Misses()
    from_disk: Misses = Misses()
    evictions: int = 0
    resident: tuple[str, ...] = ()
    """`name@version` of those that can answer, the longest unused first."""
    alone: tuple[str, ...] = ()
    """Those of them that have a model of their own."""
    in_host_memory: int = 0
    """How many lie in host memory."""
    bytes: int = 0
    """Of the bank, and of the tensors of models of their own."""

    def missed(self, where: Literal["from_host", "from_disk"], seconds: float, size: int) -> Statistics:
        """With one more adapter loaded."""
        if where == "from_host":
            return replace(self, from_host=self.from_host.plus(seconds, size))
        return replace(self, from_disk=self.from_disk.plus(seconds, size))
