"""The rows that a query gave, and whether two queries gave the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

Cell = None | int | float | str | bytes


@dataclass(frozen=True)
class Rows:
    """What a query gave: the number of columns (their names do not count) and the rows in SQLite's order."""

    columns: int
    rows: tuple[tuple[Cell, ...], ...]


def same_rows(left: Rows, right: Rows, *, ordered: bool) -> bool:
    """Whether two results hold the same rows, each as often, and in the same order if `ordered`.

    NULL equals only NULL; a number equals no text and no blob; integers are equal exactly, and a real number equals
    another number within a relative 1e-9 (sums come out in another order). Column names do not count.
    """
    if left.columns != right.columns or len(left.rows) != len(right.rows):
        return False
    labels = [_labels([*first, *second]) for first, second in zip(_columns_of(left), _columns_of(right), strict=True)]
    rows: list[tuple[object, ...]] = list(zip(*labels, strict=True))
    half = len(left.rows)
    return rows[:half] == rows[half:] if ordered else Counter(rows[:half]) == Counter(rows[half:])


def _columns_of(result: Rows) -> Iterator[list[Cell]]:
    return ([row[index] for row in result.rows] for index in range(result.columns))


def _labels(cells: list[Cell]) -> list[object]:
    """A label per cell of one column, the same for cells that count as equal.

    Numbers are sorted, and a run of neighbours within the tolerance that holds a real number shares a label: unlike
    comparing rows in pairs, this gives one answer whatever the order of rows, in n log n. A run of integers alone is
    compared exactly, or neighbouring 12-digit keys would be one.
    """
    numbers = sorted({cell for cell in cells if isinstance(cell, int | float)})
    real = {cell for cell in cells if isinstance(cell, float)}
    runs: list[list[int | float]] = []
    for number in numbers:
        if runs and math.isclose(number, runs[-1][-1], rel_tol=1e-9):
            runs[-1].append(number)
        else:
            runs.append([number])
    label = {number: run[0] if not real.isdisjoint(run) else number for run in runs for number in run}
    return [("number", label[cell]) if isinstance(cell, int | float) else cell for cell in cells]
