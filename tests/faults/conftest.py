"""One lab for all tests here: what it has looked at once it need not look at again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.lab import Lab, Trace, memory
from faults.scenarios import Case, after_a_kill, cases, starts

FOLLOWERS = {
    "publish with a base and two aliases": ("publish on a base that is there", "tag a new alias"),
    "publish": ("publish another",),
    "restore": ("remove a version", "collect versions"),
    "remove a version": ("collect",),
}
"""What another operation could build on, if it is visible and not durable."""


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield Lab(Path(folder))


@pytest.fixture(scope="session")
def single(lab: Lab) -> list[Case]:
    """Every operation on an empty and on a stocked registry."""
    return [case for start in starts(lab) for case in cases(lab, start)]


@pytest.fixture(scope="session")
def after_kills(lab: Lab, single: list[Case]) -> list[Trace]:
    """Every operation killed where something is pending, and a sample of the other points; then something is done."""
    return [trace for case in single for trace in after_a_kill(lab, case, FOLLOWERS.get(case.name, ()), stride=16)]
