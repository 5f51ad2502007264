"""Which versions an engine knows by their references, and for how long."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from peftkit.registry.store import Version


class Known:
    """What references mean to the engine: versions that are answered under a name, and those that are just asked."""

    def __init__(self, versions: dict[str, Version]) -> None:
        """`versions` is what the engine looks references up in."""
        self._versions = versions
        self._kept: set[str] = set()
        self._asked: Counter[str] = Counter()
        self._leaving: dict[str, Version] = {}
        self._lock = threading.Lock()

    def keep(self, version: Version) -> None:
        """Know a version until it is dropped."""
        with self._lock:
            self._versions[version.reference] = version
            self._kept.add(version.reference)

    def drop(self, version: Version) -> None:
        """Know it no longer than those who are just asking it."""
        with self._lock:
            self._kept.discard(version.reference)
            self._clean(version.reference)
            self._leaving[version.reference] = version

    def leave(self, version: Version) -> None:
        """Count one as dropped that could not be made ready, unless it is kept."""
        with self._lock:
            self._leaving[version.reference] = version

    def left(self, asked: Callable[[], Set[str | None]]) -> list[Version]:
        """Versions that were dropped, each once, when neither anybody is asking them nor they are among `asked`, which
        is looked at after that."""
        if not self._leaving:
            return []
        with self._lock:
            unknown = [version for version in self._leaving.values() if version.reference not in self._versions]
            gone = [version for version in unknown if version.reference not in asked()]
            for reference in (*self._kept, *(version.reference for version in gone)):
                self._leaving.pop(reference, None)
        return gone

    @contextmanager
    def during(self, version: Version) -> Iterator[None]:
        """Know a version for as long as the block takes."""
        reference = version.reference
        with self._lock:
            self._versions[reference] = version
            self._asked[reference] += 1
        try:
            yield
        finally:
            with self._lock:
                self._asked[reference] -= 1
                self._clean(reference)

    def _clean(self, reference: str) -> None:
        if not self._asked[reference]:
            del self._asked[reference]
            if reference not in self._kept:
                self._versions.pop(reference, None)
