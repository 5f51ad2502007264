"""Optional packages: used inside `extra`, a missing one is an error that names the command which installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peftkit.errors import ConfigError


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Import what the extra `name` brings inside this block. Raises ConfigError where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{purpose} needs the package {error.name!r}, which is not installed"
        raise ConfigError([missing], hint=f"pip install 'peftkit[{name}]'") from error
