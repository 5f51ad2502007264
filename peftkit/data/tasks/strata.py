"""Setting rows aside so that both sides have every label, and drawing as many rows of each label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from peftkit.data.mixture import drawn
from peftkit.data.tasks.task import TaskRow
from peftkit.errors import DataError


def set_aside(keys: Sequence[str], strata: Sequence[str], share: float, seed: int) -> set[int]:
    """Indices to hold out: `share` of every stratum, as nearly as whole groups of equal keys allow.

    Rows with one key stay on one side; their stratum is the least of theirs. The rows to hold out are round(share · n)
    in all, at least one; strata get their share of them, largest remainders first. Of each stratum one group at least
    is trained on, so one with a single group gives none. The result depends on keys, strata and seed, not on the order
    or the machine. Raises DataError where no group can be spared.
    """
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    groups: dict[str, list[str]] = {}
    for key in sorted(members, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "replace")).digest()):
        groups.setdefault(min(strata[index] for index in members[key]), []).append(key)
    sizes = {name: sum(len(members[key]) for key in names) for name, names in groups.items() if len(names) > 1}
    if not sizes:
        raise DataError(
            f"{len(keys):,} rows have {len(groups)} label(s) with one distinct content each: none can be set aside",
            expected="two rows of a label that differ",
            hint="add rows, or name rows to measure on: data.held_out=…",
        )
    held: set[int] = set()
    for name, quota in _quotas(sizes, max(1, round(share * len(keys))), share).items():
        left = len(groups[name])
        for key in groups[name]:
            if left > 1 and len(members[key]) <= quota:
                held.update(members[key])
                quota, left = quota - len(members[key]), left - 1
    if held:
        return held
    return set(
        members[min((names[0] for names in groups.values() if len(names) > 1), key=lambda key: len(members[key]))]
    )


def _quotas(sizes: dict[str, int], wanted: int, share: float) -> dict[str, int]:
    """Rows to hold out of each stratum."""
    exact = {name: share * size for name, size in sizes.items()}
    quotas = {name: int(value) for name, value in exact.items()}
    rest = sorted(sizes, key=lambda name: (quotas[name] - exact[name], name))
    for name in rest[: max(0, wanted - sum(quotas.values()))]:
        quotas[name] += 1
    return quotas


def draw_balanced(rows: Sequence[TaskRow], count: int, seed: int) -> list[TaskRow]:
    """The same number of rows of every label, `count` in all or the next lower multiple, in the order they came in.

    Larger draws with the same seed hold the rows of smaller ones. Raises DataError where a label has too few.
    """
    by_label: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_label.setdefault(row.target, []).append(index)
    each = count // len(by_label)
    few = {label: len(found) for label, found in sorted(by_label.items()) if len(found) < each}
    if few or not each:
        have = ", ".join(f"{label!r} has {found:,}" for label, found in few.items()) or f"{len(by_label)} labels"
        raise DataError(
            f"data.balance: {count:,} rows of {len(by_label)} labels are {each:,} of each, and {have}",
            expected="as many rows of every label",
            hint="set data.max_train_rows to a number that every label has, or leave data.balance out",
        )
    chosen = [index for label, found in by_label.items() for index in drawn(found, each, f"{seed}\0{label}")]
    return [rows[index] for index in sorted(chosen)]
