"""A weighted mixture of data sets: how many rows of each an epoch has, which, and in what order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from peftkit.errors import DataError

T = TypeVar("T")


def drawn(rows: Sequence[T], count: int, seed: int | str) -> list[T]:
    """So many of the rows, without replacement and in the order they came in; all where there are no more.

    Which depends on the number of rows and the seed alone, on every machine; the rows of a smaller draw are among those
    of a larger one with the same seed, so scores over growing draws belong together.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{index}".encode()).digest()

    chosen = sorted(sorted(range(len(rows)), key=rank)[:count])
    return [rows[index] for index in chosen]


def counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each set a mixture has: a set's share of the weights, of as many rows as all sets have together.

    A share that is no whole number is rounded up or down, so that the numbers add up (largest remainders first).
    Weights are read as the decimals they are written as. Raises DataError for an empty set, for weights that are not
    above 0, and for one so small that its set would have no row.
    """
    if not sizes or len(sizes) != len(weights) or min(sizes) < 1 or not all(weight > 0 for weight in weights):
        raise DataError(
            f"a mixture of sets of {', '.join(map(str, sizes)) or 'no'} rows with the weights {list(weights)}",
            expected="a weight above 0 for every set, and at least one row in each",
        )
    exact = [Fraction(repr(weight)) for weight in weights]
    wanted = [sum(sizes) * weight / sum(exact) for weight in exact]
    found = [int(share) for share in wanted]
    largest = sorted(range(len(sizes)), key=lambda index: found[index] - wanted[index])
    for index in largest[: sum(sizes) - sum(found)]:
        found[index] += 1
    if not all(found):
        weight = weights[found.index(0)]
        raise DataError(
            f"the weight {weight:g} of {sum(map(float, exact)):g} gives none of {sum(sizes):,} rows to its set",
            expected=f"at least {float(sum(exact) / sum(sizes)):.2g}, which is one row",
            hint="raise this weight, or leave the set out",
        )
    return found


def mix(sets: Sequence[Sequence[T]], weights: Sequence[float], *, seed: int) -> list[T]:
    """One epoch of a mixture. A weight is a ratio: its set has weight / sum(weights) of the epoch's rows.

    An epoch has as many rows as all sets together. A set that has fewer rows than its share is repeated: each row
    stands there equally often or once more; of a larger set as many are drawn, none twice. Which rows are drawn, and
    which stand there once more, depends on the seed; every epoch of a run has the same. The sets are interleaved, so
    the first rows of the mixture have about the same shares as all of them. Weights that are the sizes of the sets give
    every row once.

    Raises DataError as `counts` does.
    """
    parts = []
    for number, (rows, count) in enumerate(zip(sets, counts([len(one) for one in sets], weights), strict=True)):
        rest = drawn(range(len(rows)), count % len(rows), f"{seed}\0{number}")
        parts.append([*list(rows) * (count // len(rows)), *(rows[index] for index in rest)])
    # The j-th of n rows is due at (j + 1/2) / n of the way.
    due = [((at + 0.5) / len(part), number, at) for number, part in enumerate(parts) for at in range(len(part))]
    return [parts[number][at] for _, number, at in sorted(due)]


def digest(sha256: Sequence[str], weights: Sequence[float]) -> str:
    """SHA-256 of a mixture: over the digests of its sets and their weights, in their order."""
    pairs = [[one, float(weight)] for one, weight in zip(sha256, weights, strict=True)]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def name(mixture: Mapping[str, float]) -> str:
    """A mixture in one line, without folders: `a.jsonl (0.7) + b.jsonl (0.3)`."""
    return " + ".join(f"{Path(source).name} ({weight:g})" for source, weight in mixture.items())


def check_mixture(train: str | None, mixture: Mapping[str, float]) -> None:
    """Raise ValueError unless `train` and `mixture` go together: at most one is set, and weights are above 0."""
    if train is not None and mixture:
        raise ValueError("train and mixture are both set; set one: a single file is train, several are a mixture")
    wrong = {source: weight for source, weight in mixture.items() if not weight > 0}
    if wrong:
        raise ValueError(f"mixture: weights must be above 0, and {wrong} are not; leave a set out that is not wanted")
    names = [Path(source).name for source in mixture]
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:  # messages name rows by file and line, and the registry keeps no folders
        raise ValueError(f"mixture: several files are named {', '.join(twice)}; rename all but one")
