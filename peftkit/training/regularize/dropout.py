"""The base's own dropout, found wherever its modules keep a rate, and set to another one for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

Place = tuple[nn.Module, str]
"""A module, and the attribute of it that is a dropout rate."""


def places_of_dropout(model: nn.Module) -> list[Place]:
    """Where the base keeps dropout rates: nn.Dropout, and the numbers that attention reads (`attention_dropout`).

    What an adapter put beside a layer is not the base's.
    """
    return [place for module in _of_the_base(model) for place in _places(module)]


def drops(model: nn.Module) -> bool:
    """Whether anything in the model, adapters included, drops in training."""
    return any(getattr(module, name) > 0 for module in model.modules() for _, name in _places(module))


@contextmanager
def dropout_at(places: Sequence[Place], rate: float) -> Iterator[None]:
    """Have every place drop with this rate inside, and with its own afterwards."""
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, rate)
        yield
    finally:
        for (module, name), own in zip(places, before, strict=True):
            setattr(module, name, own)


def _of_the_base(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(around := getattr(module, "base_layer", None), nn.Module):  # an adapter's layer around the base's
        yield from _of_the_base(around)
        return
    yield module
    for child in module.children():
        yield from _of_the_base(child)


def _places(module: nn.Module) -> Iterator[Place]:
    if isinstance(module, nn.Dropout):
        yield module, "p"
    for name, value in vars(module).items():
        rate = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if rate and "dropout" in name:
            yield module, name
