"""Rows → a training side and a held-out side that share no content and are the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from peftkit.errors import ConfigError, DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Split(Generic[T]):
    """Both sides, each in the order the rows came in."""

    train: tuple[T, ...]
    held_out: tuple[T, ...]


def split(rows: Sequence[T], held_out: float | int, seed: int, key: Callable[[T], str]) -> Split[T]:
    """Hold out a share of the rows (a float between 0 and 1) or a number of them (an int).

    Rows with an equal key form a group that stays on one side, so the number is met as nearly as whole groups allow:
    groups are taken in the order of SHA-256(seed, key) and those that would overshoot are passed over; one of these is
    taken on top, or one group alone, if that comes nearer. Distinct rows are met exactly. Each side gets at least one
    group. The result depends on the keys and the seed alone: neither on the order of the rows nor on the machine.

    Raises ConfigError for a size that is no share and no count, DataError when a side would be empty.
    """
    wanted = _wanted(len(rows), held_out)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(key(row), []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"{len(rows):,} rows have {len(groups)} distinct content(s): they cannot stand on two sides",
            expected="at least two distinct rows",
        )
    taken = _take({name: len(indices) for name, indices in groups.items()}, wanted, seed)
    held = {index for name in taken for index in groups[name]}
    return Split(
        train=tuple(row for index, row in enumerate(rows) if index not in held),
        held_out=tuple(row for index, row in enumerate(rows) if index in held),
    )


def _wanted(total: int, held_out: float | int) -> int:
    """Return the number of rows to hold out; raises as `split` does."""
    if isinstance(held_out, bool) or not isinstance(held_out, int | float):
        raise ConfigError([f"held_out: {held_out!r} is neither a share (0.1) nor a number of rows (100)"])
    if isinstance(held_out, float) and not 0.0 < held_out < 1.0:
        raise ConfigError([f"held_out: the share {held_out!r} is not between 0 and 1; a number of rows has no point"])
    if held_out < 0:
        raise ConfigError([f"held_out: {held_out!r} is less than 0"])
    wanted = round(total * held_out) if isinstance(held_out, float) else held_out
    if 0 < wanted < total:
        return wanted
    side = "training" if wanted else "held-out"
    raise DataError(
        f"held_out={held_out!r} of {total:,} rows is {wanted:,}: the {side} side would be empty",
        expected=f"1 to {total - 1:,} rows" if total > 1 else "at least two rows",
    )


def _take(sizes: dict[str, int], wanted: int, seed: int) -> set[str]:
    """Choose the groups to hold out: at least one, never all."""
    # not random.shuffle: its order would follow the order of the rows; not hash(): it differs from process to process
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest())
    taken: set[str] = set()
    short = wanted
    for name in order:
        if sizes[name] <= short and len(taken) < len(order) - 1:
            taken.add(name)
            short -= sizes[name]
    left = [name for name in order if name not in taken]
    smallest, alone = min(left, key=sizes.__getitem__), min(order, key=lambda name: abs(sizes[name] - wanted))
    choices = [taken, {*taken, smallest} if len(left) > 1 else taken, {alone}]
    return min(filter(None, choices), key=lambda names: abs(sum(sizes[name] for name in names) - wanted))
