"""Who answers which row of a file, and what all its answers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from peftkit.data.questions import Questions
from peftkit.errors import ConfigError, DataError, RegistryError
from peftkit.generation.opening import Found
from peftkit.generation.requests import Request
from peftkit.registry.store import Registry, Version


@dataclass(frozen=True)
class Who:
    """Who answers which row."""

    versions: list[Version]
    asked: tuple[Version | None, ...] = ()
    """By whom every row is answered."""
    by_name: Mapping[str, Version] | None = None
    """Or what the names in the rows mean."""

    @classmethod
    def named(cls, registry: Registry, adapters: Sequence[str], with_base: bool, questions: Questions) -> Who:
        """What the names mean now.

        Raises ConfigError when none is named, or names are given twice over, DataError for a name in a row and
        RegistryError for another that means nothing.
        """
        if questions.column is not None and (adapters or with_base):
            problem = f"the column {questions.column!r} says who answers each row: name no adapter, and not the base"
            raise ConfigError([problem], where="what was asked")
        names = [name for name in questions.names if name] if questions.column else list(adapters)
        by_name = {name: _resolve(registry, name, questions) for name in names}
        versions = list({version.reference: version for version in by_name.values()}.values())
        if not versions:
            raise ConfigError(["no adapter is named, so it is not known which base to load"], where="what was asked")
        if questions.column is not None:
            return cls(versions, by_name=by_name)
        return cls(versions, (*([None] if with_base else []), *versions))

    @property
    def width(self) -> int:
        """Answers to each row."""
        return 1 if self.by_name is not None else len(self.asked)

    def of(self, name: str | None) -> Sequence[Version | None]:
        """Who answers a row that names `name`."""
        if self.by_name is None:
            return self.asked
        return [self.by_name[name] if name else None]

    def job(self, line: Mapping[str, Any]) -> int:
        """Which answer a line holds."""
        row = int(line["row"])
        if self.by_name is not None:
            return row
        return row * self.width + self._order[line["adapter"]]

    @cached_property
    def _order(self) -> dict[str | None, int]:
        return {reference(version): at for at, version in enumerate(self.asked)}


def _resolve(registry: Registry, name: str, questions: Questions) -> Version:
    try:
        return registry.resolve(name)
    except RegistryError as error:
        if questions.column is None:
            raise
        fact = f"{questions.names[name]}: {questions.column}: {error.fact}"
        raise DataError(fact, expected=error.expected, hint=error.hint) from error


def what_answers_depend_on(questions: Questions, who: Who, found: Found, like: Request) -> dict[str, Any]:
    """What stands before the answers: other values, other answers."""
    settings = {key: value for key, value in asdict(like).items() if key not in ("prompt", "adapter")}
    settings["stop"], settings["stop_ids"] = list(like.stop), list(like.stop_ids)
    adapters: Any = [reference(version) for version in who.asked]
    if who.by_name is not None:
        adapters = {"column": questions.column, **{name: version.id for name, version in who.by_name.items()}}
    return {
        "rows": {"file": questions.path.name, "sha256": questions.sha256, "count": questions.count},
        "adapters": adapters,
        "base": {"fingerprint": found.fingerprint, "quantization": found.quant.model_dump(mode="json")},
        "settings": settings,
    }


def reference(version: Version | None) -> str | None:
    """`name@version`; None is the base."""
    return version.reference if version else None
