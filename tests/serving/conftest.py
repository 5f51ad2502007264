"""Fixtures of the server's tests: a registry over a tiny base, a server, and what its versions answer alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from generation.adapters_lab import Lab, make_lab
from generation.serving_lab import Oracle
from serving.server_lab import Server, serving

NAMES = ("tickets", "sql")


@pytest.fixture(scope="package")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A tiny base with the adapters `tickets` and `sql`; who publishes more gives them names of their own."""
    made = make_lab(tmp_path_factory.mktemp("served"))
    for seed, name in enumerate(NAMES):
        made.lora(name, seed + 1)
    return made


@pytest.fixture(scope="package")
def oracle(lab: Lab) -> Oracle:
    """What each version answers alone."""
    return Oracle(lab)


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Server]:
    """A server of `tickets` and `sql`, for the tests of a file; leave its names as they are."""
    with serving(lab, NAMES) as running:
        yield running
