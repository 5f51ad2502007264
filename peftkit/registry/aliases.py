"""Aliases: each a folder of numbered records, the highest of which says where the alias points (FORMAT.md, section 2).

A move creates the next number exclusively, so two processes that move one alias both appear in its history.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.canonical import canonical_json, digest_json, strict_json
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry.layout import FORMAT, Layout, is_alias, is_record_name, is_version_id
from peftkit.registry.manifest import check_format, timestamp
from peftkit.registry.reading import LARGEST_MOVE, read_plain

_HIGHEST = 99_999_999
"""The last number of 8 digits."""
_FIELDS = {"format", "name", "alias", "number", "version", "time", "previous", "check"}


@dataclass(frozen=True)
class Move:
    """One record of an alias; `version` is None where the alias was removed."""

    alias: str
    number: int
    version: str | None
    time: str


def names(layout: Layout, name: str) -> list[str]:
    """The aliases of `name` that have a record, removed ones too, sorted."""
    folder = layout.aliases(name)
    if not folder.is_dir():
        return []
    found = (entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    return sorted(alias for alias in found if is_alias(alias) and numbers(layout, name, alias))


def numbers(layout: Layout, name: str, alias: str) -> list[int]:
    """The numbers of the records of an alias, ascending; empty for an unknown alias."""
    try:
        found = os.listdir(layout.alias(name, alias))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(entry) for entry in found if is_record_name(entry))


def current(layout: Layout, name: str, alias: str) -> Move | None:
    """Where an alias points: its newest record, None when it has none. Raises AdapterDamaged."""
    found = numbers(layout, name, alias)
    if not found:
        return None
    try:
        return read(layout, name, alias, found[-1])
    except AdapterDamaged:
        if os.path.lexists(layout.record(name, alias, found[-1])):
            raise
        return None  # records go only with their adapter, which was removed just now


def history(layout: Layout, name: str, alias: str) -> list[Move]:
    """All moves of an alias, oldest first. Raises AdapterDamaged."""
    return [read(layout, name, alias, number) for number in numbers(layout, name, alias)]


def readable(layout: Layout, name: str, alias: str) -> list[Move]:
    """The moves of an alias that can be read, oldest first; damaged ones are passed over, `verify` names them."""
    moves = (_readable(layout, name, alias, number) for number in numbers(layout, name, alias))
    return [move for move in moves if move is not None]


def read(layout: Layout, name: str, alias: str, number: int) -> Move:
    """One record. Raises AdapterDamaged when it is not, to the byte, what was written at this place.

    Raises RegistryError when it is of another format.
    """
    path = layout.record(name, alias, number)
    try:
        record = _decode(read_plain(path, LARGEST_MOVE), path)
        expected = {"name": name, "alias": alias, "number": number}
        found = {key: record[key] for key in expected}
        if found != expected:
            raise ValueError(f"it belongs to {found['name']}@{found['alias']}, number {found['number']}")
    except (OSError, ValueError) as error:
        raise AdapterDamaged(
            f"the alias record {path} cannot be used: {error}",
            expected="the record that was written",
            hint=f"peftkit tag {name}@VERSION {alias} points the alias anew; peftkit show {name} lists the versions",
        ) from error
    return Move(alias, number, record["version"], record["time"])


def move(layout: Layout, name: str, alias: str, version: str | None) -> Move:
    """Point an alias at a version, or nowhere (None); an alias that already points there is left alone.

    What the new record builds on is made durable first, since whoever wrote it may have died before syncing it: the
    entry of the version, and the records so far.
    """
    folder = layout.alias(name, alias)
    durable.make_folder(layout.aliases(name))
    durable.make_folder(folder)
    if version is not None:
        durable.sync_folder(layout.versions(name))
    while True:
        found = numbers(layout, name, alias)
        if found:
            durable.sync_folder(folder)
        number = (found[-1] if found else 0) + 1
        if number > _HIGHEST:
            raise RegistryError(
                f"{name}@{alias} has a record number {_HIGHEST}, after which there is none",
                expected="at most 8 digits",
                hint=f"peftkit verify {name}; peftkit tag {name}@VERSION another-alias",
            )
        if (now := _readable(layout, name, alias, number - 1)) and now.version == version:
            return now
        data = _encode(layout, name, alias, number, version)
        try:
            durable.create_file(layout.record(name, alias, number), data, layout.tmp)
        except FileExistsError:
            continue  # another process took this number: ours is the next
        return read(layout, name, alias, number)


def problems(layout: Layout, name: str, alias: str) -> list[str]:
    """What is wrong with an alias, as sentences."""
    found = numbers(layout, name, alias)
    sentences = [
        f"Record {number} is missing." for number in range(1, found[-1] if found else 1) if number not in found
    ]
    before: bytes | None = None
    for number in found:
        path = layout.record(name, alias, number)
        try:
            move = read(layout, name, alias, number)
            data = read_plain(path, LARGEST_MOVE)
            previous = strict_json(data)["previous"]
        except (RegistryError, OSError) as error:
            sentences.append(f"{str(error).splitlines()[0]}.")
            before = None
            continue
        if before is not None and previous != hashlib.sha256(before).hexdigest():
            sentences.append(f"Record {number} does not follow from record {number - 1}.")
        gone = move.version is not None and not layout.version(name, move.version).is_dir()
        if gone and numbers(layout, name, alias)[-1] == number:  # looked at last: it may have moved on just now
            sentences.append(f"It points at {move.version}, which is no version here.")
        before = data if number + 1 in found else None
    return sentences


def _readable(layout: Layout, name: str, alias: str, number: int) -> Move | None:
    try:
        return read(layout, name, alias, number) if number else None
    except AdapterDamaged:
        return None  # a damaged record must not keep the alias from moving on


def _encode(layout: Layout, name: str, alias: str, number: int, version: str | None) -> bytes:
    fields = {
        "format": FORMAT,
        "name": name,
        "alias": alias,
        "number": number,
        "version": version,
        "time": timestamp(),
        "previous": _digest(layout.record(name, alias, number - 1)) if number > 1 else None,
    }
    return canonical_json({**fields, "check": digest_json(fields)}) + b"\n"


def _digest(record: Path) -> str | None:
    """SHA-256 of a record's bytes; None for what no record is, so that an alias can move on from it."""
    try:
        return hashlib.sha256(read_plain(record, LARGEST_MOVE)).hexdigest()
    except OSError:
        return None


def _decode(data: bytes, path: Path) -> dict[str, Any]:
    """The fields of a record; ValueError when they are not, to the byte, what `_encode` writes."""
    record = strict_json(data)
    if isinstance(record, dict) and "format" in record:
        check_format(record["format"], path)  # before its fields, which another format has others of
    if not isinstance(record, dict) or set(record) != _FIELDS:
        raise ValueError(f"its fields are not {', '.join(sorted(_FIELDS))}")
    if digest_json({key: value for key, value in record.items() if key != "check"}) != record["check"]:
        raise ValueError("its bytes were changed")
    if canonical_json(record) + b"\n" != data:
        raise ValueError("its bytes were changed")
    if record["version"] is not None and not (isinstance(record["version"], str) and is_version_id(record["version"])):
        raise ValueError(f"its version is {record['version']!r}")
    return record
