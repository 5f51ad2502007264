"""Attached names, and the versions that answer to them now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from peftkit.registry.layout import parse_reference
from peftkit.registry.store import Version


@dataclass(frozen=True)
class Model:
    """A name that may be asked for."""

    id: str
    """`tickets`, `sql@prod`; the base has its source's name."""
    version: Version | None
    """What answers now; None is the base."""
    since: float = field(default_factory=time.time)
    """When it became that: seconds since 1970."""
    trouble: str | None = None
    """Why it is not what the registry says now; None when it is."""

    def answers_with(self, version: Version) -> bool:
        """Whether it is this version that answers."""
        return self.version is not None and self.version.reference == version.reference


class Names:
    """Attached names in their order."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._implicit: set[str] = set()

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    @property
    def listed(self) -> list[Model]:
        """Those that were attached by their name, and do not just answer because `tickets` is attached."""
        return [model for name, model in self._models.items() if name not in self._implicit]

    def get(self, name: str) -> Model | None:
        """The model of a name, when it is attached."""
        return self._models.get(name)

    def put(self, name: str, version: Version) -> Model:
        """Let a name answer with a version, without trouble."""
        known = self._models.get(name)
        since = known.since if known is not None and known.answers_with(version) else time.time()
        self._models[name] = Model(name, version, since)
        return self._models[name]

    def is_listed(self, name: str) -> bool:
        """Whether a name was attached by itself."""
        return name in self._models and name not in self._implicit

    def show(self, name: str, listed: bool) -> None:
        """Say whether a name is attached by itself."""
        (self._implicit.discard if listed else self._implicit.add)(name)

    def remove(self, name: str) -> list[Model]:
        """No longer answer to a name, nor to those that answered because of it; returns them."""
        gone = [name, *(each for each in self.of(name) if each in self._implicit)] if "@" not in name else [name]
        self._implicit.difference_update(gone)
        return [self._models.pop(each) for each in gone]

    def trouble(self, name: str, why: str) -> None:
        """Say why a name is not what the registry says."""
        self._models[name] = replace(self._models[name], trouble=why)

    def of(self, name: str) -> list[str]:
        """The attached names of one adapter: `sql`, `sql@prod`."""
        return [each for each in self._models if parse_reference(each).name == name]

    def following(self, name: str, alias: str) -> list[str]:
        """Those of them that answer with whatever an alias points at."""
        return [each for each in self.of(name) if parse_reference(each).alias == alias]

    def answered_by(self, version: Version) -> bool:
        """Whether a name answers with a version."""
        return any(model.answers_with(version) for model in self._models.values())
