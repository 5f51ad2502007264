"""What is known of versions that were looked at, so that nobody looks twice."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftkit.generation.fleet.room import Need


@dataclass
class Learned:
    """Facts by version id."""

    reasons: dict[str, str | None] = field(default_factory=dict)
    """Why one cannot lie in the bank; None: nothing says so yet."""
    needs: dict[str, Need] = field(default_factory=dict)
    """What each takes."""
    _shapes: dict[tuple[tuple[str, int], ...], dict[str, int]] = field(default_factory=dict)

    def ranks(self, version_id: str, ranks: dict[str, int]) -> Need:
        """What a version takes in the bank; the ranks are one object for all adapters of a shape."""
        need = self.needs[version_id] = Need(self._shapes.setdefault(tuple(ranks.items()), ranks))
        return need

    def forget(self, version_id: str) -> None:
        """Know nothing of a version any more."""
        self.reasons.pop(version_id, None)
        self.needs.pop(version_id, None)
        used = {id(need.ranks) for need in self.needs.values()}
        self._shapes = {shape: ranks for shape, ranks in self._shapes.items() if id(ranks) in used}
