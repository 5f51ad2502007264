"""A tiny base with adapters, and fleets over it that are closed behind every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from generation.adapters_lab import Lab, make_lab

from peftkit.generation.fleet.fleet import Fleet
from peftkit.registry.store import Version


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("fleet"), num_hidden_layers=1)
    for seed in range(6):
        lab.lora(f"a{seed}", seed, r=2 + seed % 3)
    return lab


@pytest.fixture
def fleet(lab: Lab) -> Iterator[Callable[..., Fleet]]:
    """Fleets over the lab's base; whatever a test did, no seat was left behind, and closing gives all memory back."""
    made: list[Fleet] = []

    def make(resolve: Callable[[str], Version] = lab.registry.resolve, **settings: Any) -> Fleet:
        made.append(Fleet(lab.backbone(), resolve, **settings))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()
        assert fleet.statistics().bytes == 0
        assert fleet.statistics().resident == ()
