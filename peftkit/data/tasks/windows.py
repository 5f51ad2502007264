"""A long sequence as overlapping windows, and which of them each position is read in."""

from __future__ import annotations

from collections.abc import Sequence


def windows(length: int, room: int, stride: int) -> list[range]:
    """Windows of at most `room` positions over `length`, neighbours sharing `stride` of them; the last may share more.

    Every position is in one, and all are full where there are several. Raises ValueError when `room` is not above
    `stride`, as windows would not move on.
    """
    if length <= room:
        return [range(length)]
    if room <= stride:
        raise ValueError(f"windows of {room} that share {stride} do not move on")
    starts = [*range(0, length - room, room - stride), length - room]
    return [range(start, start + room) for start in starts]


def owner(position: int, over: Sequence[range]) -> int:
    """The window that a position is read in: where the nearer end of the window is farthest away, the first of such.

    The rule of Devlin et al.'s run_squad.py (`_check_is_max_context`). Later positions never have an earlier owner.
    """
    inside = [at for at, window in enumerate(over) if position in window]
    return max(inside, key=lambda at: (min(position - over[at].start, over[at].stop - 1 - position), -at))
