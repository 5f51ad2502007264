"""Small files of rows, and figures that are compared leaf by leaf."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The path, with the rows as JSON lines in it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preferences(count: int, word: str) -> list[dict[str, Any]]:
    """Pairs whose prompts begin with a word."""
    return [{"prompt": f"{word} {i}?", "chosen": f"it is {i}", "rejected": f"no {9 * i}!"} for i in range(count)]


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested figures with its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{at}/{key}")
    else:
        yield at, value


def same_figures(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Assert that figures are the same, to rounding."""
    ours, theirs = dict(flat(one)), dict(flat(other))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, float):
            assert math.isclose(value, theirs[key], rel_tol=1e-5, abs_tol=1e-6), key
        else:
            assert value == theirs[key], key
