"""Settings resolved: all sources merged and validated, each leaf with the source that set it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from peftkit.config.merge import Merge
from peftkit.config.problems import explain
from peftkit.config.spec import leaves
from peftkit.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A validated configuration, and for each leaf the source that set it."""

    config: T
    sources: dict[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """Every leaf as (dotted key, value, source), in field order."""
        return [(key, value, self.sources[key]) for key, value in leaves(self.config)]

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; `dump_yaml` of it resolves to an equal configuration."""
        return self.config.model_dump(mode="json")

    def changed(self, values: Mapping[str, Any], source: str) -> Resolved[T]:
        """The same with some leaves (by dotted key) set by another source. Raises ConfigError for a wrong value."""
        plain = self.as_dict()
        for key, value in values.items():
            *path, name = key.split(".")
            group = plain
            for part in path:
                group = group[part]
            group[name] = value
        try:
            config = type(self.config).model_validate(plain)
        except ValidationError as error:
            raise ConfigError([str(problem["msg"]) for problem in error.errors()], where=source) from error
        return Resolved(config, {**self.sources, **dict.fromkeys(values, source)})

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, no spaces, UTF-8)."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def resolve(
    model: type[T],
    *,
    presets: Mapping[str, Mapping[str, Any]] = {},
    preset: str | None = None,
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
) -> Resolved[T]:
    """Merge all sources of settings and validate them; raises ConfigError with every problem at once."""
    merge = Merge(model)
    if preset is not None:
        merge.add_preset(preset, presets)
    for path in files:
        merge.add_file(Path(path))
    for text in overrides:
        merge.add_override(text)
    problems = merge.problems
    try:
        config = model.model_validate(merge.assemble())
    except ValidationError as error:
        problems = problems + explain(error, merge)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    sources = {key: merge.given[key].source if key in merge.given else "default" for key, _ in leaves(config)}
    return Resolved(config, sources)
