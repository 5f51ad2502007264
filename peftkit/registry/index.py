"""What `list` and `log` read: a summary of every version, by way of a cache that can be deleted at any time.

What there is, and where each alias points, is always read from the disk. A summary comes from the cache only while
the manifest it was made of has the same inode, size and times; everything else is read again.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from peftkit.errors import AdapterNotFound, RegistryError
from peftkit.registry import aliases as alias_records
from peftkit.registry.cache import Cache, Key
from peftkit.registry.layout import MANIFEST, Layout, is_alias, is_name
from peftkit.registry.manifest import Metrics, Version
from peftkit.registry.store import Registry
from peftkit.registry.writing import check_root_format

MOST_FIGURES = 256
_LONGEST_PATH = 200
_SETTLED = 2_000_000_000
"""Nanoseconds: a file changed again within the finest step of its file system's clock (2 s on FAT) looks unchanged."""


@dataclass(frozen=True)
class Parent:
    """A version that another was made from, and how: `continued` or `combined`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: str
    version: str
    relation: str


@dataclass(frozen=True)
class Source:
    """Rows that a version was trained or measured on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    role: str
    source: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Summary:
    """One version in short; one whose manifest is damaged has a name, an id and a problem, and nothing else."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: str
    id: str
    created: str = ""
    kind: str = ""
    base: str = ""
    """Where the base came from."""
    record: str | None = None
    fingerprint: str = ""
    method: str | None = None
    recipe: str | None = None
    run: str | None = None
    parents: tuple[Parent, ...] = ()
    data: tuple[Source, ...] = ()
    metric: str | None = None
    """What the score after training counts."""
    figures: dict[str, float] = field(default_factory=dict)
    """The numbers among the metrics by dotted path (`after.score.mean`): the first 256, those nearest the top first."""
    bytes: int = 0
    """Size of the payload."""
    aliases: tuple[str, ...] = ()
    """The aliases that point here now."""
    problem: str | None = None

    @property
    def reference(self) -> str:
        """`name@id`."""
        return f"{self.name}@{self.id}"


_SUMMARY = TypeAdapter(Summary)


@dataclass(frozen=True)
class Contents:
    """Everything in a registry: its versions by name, newest first, and what cannot be read, by reference."""

    versions: tuple[Summary, ...]
    problems: dict[str, str]


def contents(registry: Registry) -> Contents:
    """Read a registry; what is damaged is listed with its problem. Raises RegistryError for another format."""
    check_root_format(registry.layout)
    problems: dict[str, str] = {}
    stamps: dict[Key, str] = {}
    named: dict[Key, list[str]] = {}
    for name in _names(registry.layout):
        try:
            found, pointed, troubles = _look(registry, name)
        except FileNotFoundError:
            continue  # removed a moment ago
        except OSError as error:
            problems[name] = f"{name} cannot be read: {error}"
            continue
        stamps |= found
        problems |= troubles
        for alias, version_id in pointed.items():
            named.setdefault((name, version_id), []).append(alias)
    versions = []
    for summary in _summaries(registry, stamps):
        if summary.problem is not None:
            problems[summary.reference] = summary.problem
        aliases = named.get((summary.name, summary.id))
        versions.append(replace(summary, aliases=tuple(aliases)) if aliases else summary)
    versions.sort(key=lambda summary: (summary.created, summary.id), reverse=True)
    versions.sort(key=lambda summary: summary.name)
    return Contents(tuple(versions), problems)


def summaries(registry: Registry) -> list[Summary]:
    """Every version of every name, newest first within a name; also those without an alias, and damaged ones."""
    return list(contents(registry).versions)


def summarize(version: Version) -> Summary:
    """The summary of a version, without aliases."""
    manifest = version.manifest
    method = manifest.adapter.get("method")
    after = manifest.metrics.after
    score = after.get("score")
    metric = score.get("metric") if isinstance(score, dict) else after.get("metric")
    return Summary(
        name=version.name,
        id=version.id,
        created=manifest.created,
        kind=manifest.kind,
        base=manifest.base.source,
        record=manifest.base.record,
        fingerprint=manifest.base.fingerprint,
        method=method if isinstance(method, str) else None,
        recipe=manifest.recipe.name if manifest.recipe else None,
        run=manifest.run,
        parents=tuple(Parent(each.name, each.version, each.relation) for each in manifest.parents),
        data=tuple(Source(each.role, each.source, each.sha256, each.rows) for each in manifest.data),
        metric=metric if isinstance(metric, str) else None,
        figures=_figures(manifest.metrics),
        bytes=sum(file.bytes for file in manifest.files.values()),
    )


def _figures(metrics: Metrics) -> dict[str, float]:
    found: dict[str, float] = {}
    level: list[tuple[str, Any]] = [("after", metrics.after), ("other", metrics.other), ("before", metrics.before)]
    while level and len(found) < MOST_FIGURES:
        deeper: list[tuple[str, Any]] = []
        for path, value in level:
            if len(path) > _LONGEST_PATH:
                continue
            if isinstance(value, dict):
                deeper += [(f"{path}.{key}", item) for key, item in value.items()]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(path, float(value))
        level = deeper
    return dict(islice(found.items(), MOST_FIGURES))


def _names(layout: Layout) -> list[str]:
    try:
        with os.scandir(layout.root) as entries:
            return sorted(each.name for each in entries if is_name(each.name) and each.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _stamp(path: str) -> str:
    """What tells that a manifest is still the same file; empty for what is no plain file or changed just now."""
    try:
        found = os.lstat(path)
    except OSError:
        return ""
    if not stat.S_ISREG(found.st_mode) or max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - _SETTLED:
        return ""
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _look(registry: Registry, name: str) -> tuple[dict[Key, str], dict[str, str], dict[str, str]]:
    """The stamps of all versions of a name, where its aliases point, and what is wrong with the aliases."""
    folder = str(registry.layout.versions(name))  # as a text: joining paths takes longer than asking the disk
    pointed, problems = _aliases(registry.layout, name)
    while True:
        # After the aliases: a version is there before an alias points at it.
        stamps = {(name, each): _stamp(f"{folder}/{each}/{MANIFEST}") for each in registry.version_ids(name)}
        lost = {alias: target for alias, target in pointed.items() if (name, target) not in stamps}
        before, (pointed, problems) = pointed, _aliases(registry.layout, name) if lost else (pointed, problems)
        if pointed == before:  # else an alias moved, and its old version was removed, while we looked
            break
    for alias, target in lost.items():
        problems[f"{name}@{alias}"] = f"{name}@{alias} points at {target}, which is not there"
    if not stamps and not registry.layout.adapter(name).is_dir():
        raise FileNotFoundError(name)
    return stamps, pointed, problems


def _aliases(layout: Layout, name: str) -> tuple[dict[str, str], dict[str, str]]:
    pointed: dict[str, str] = {}
    problems: dict[str, str] = {}
    folder = layout.aliases(name)
    for alias in sorted(filter(is_alias, os.listdir(folder))) if folder.is_dir() else []:
        try:
            move = alias_records.current(layout, name, alias)
        except RegistryError as error:
            problems[f"{name}@{alias}"] = error.fact
            continue
        if move is not None and move.version is not None:
            pointed[alias] = move.version
    return pointed, problems


def _summaries(registry: Registry, stamps: Mapping[Key, str]) -> list[Summary]:
    cache = Cache(registry.layout.index)
    known = {key: summary for key, text in cache.read(stamps).items() if (summary := _decode(key, text))}
    fresh = [each for key in stamps if key not in known and (each := _read(registry, *key))]
    sound = {(each.name, each.id): each for each in fresh if each.problem is None}
    cache.write({key: (stamps[key], _encode(each)) for key, each in sound.items() if stamps[key]})
    return [*known.values(), *fresh]


def _encode(summary: Summary) -> str:
    return _SUMMARY.dump_json(summary).decode("utf-8")


def _decode(key: Key, text: str) -> Summary | None:
    """A summary as the cache holds it; None for what this code has not written there."""
    try:
        summary = _SUMMARY.validate_json(text, strict=True)
    except ValidationError:
        return None
    sound = (summary.name, summary.id) == key and summary.problem is None and not summary.aliases
    return summary if sound else None


def _read(registry: Registry, name: str, version_id: str) -> Summary | None:
    path = registry.layout.version(name, version_id) / MANIFEST
    try:
        if path.exists() and not stat.S_ISREG(path.lstat().st_mode):  # opening a pipe would wait for ever
            return Summary(name, version_id, problem=f"{path} is not a plain file")
        return summarize(registry.load(name, version_id))
    except AdapterNotFound:
        return None  # removed a moment ago
    except RegistryError as error:
        return Summary(name, version_id, problem=error.fact)
    except OSError as error:
        return Summary(name, version_id, problem=f"{path} cannot be read: {error}")
