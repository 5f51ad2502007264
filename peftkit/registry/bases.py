"""Base records and relations in a registry: files named after the digest of their bytes, written once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from peftkit import durable
from peftkit.base.record import BaseRecord
from peftkit.base.record import decode as decode_record
from peftkit.canonical import strict_json
from peftkit.errors import AdapterDamaged, BaseError, RegistryError
from peftkit.registry.layout import FORMAT, Layout, is_version_id
from peftkit.registry.manifest import Base, Version, check_format
from peftkit.registry.reading import LARGEST_RECORD, read_plain

if TYPE_CHECKING:
    from peftkit.base.relations import Relation

_Record = TypeVar("_Record")


def keep(layout: Layout, record: BaseRecord) -> str:
    """Store a base record and return its id; one that is there already is left alone."""
    return _keep(layout.bases, record.encode(), layout.tmp)


def keep_relation(layout: Layout, relation: Relation) -> str:
    """Store what was measured between two bases and return its id."""
    return _keep(layout.relations, relation.encode(), layout.tmp)


def read(layout: Layout, record_id: str) -> BaseRecord:
    """The base record with this id. Raises AdapterDamaged when it is missing or not what was written."""
    return _decode(layout.bases / f"{record_id}.json", decode_record)


def record_of(version: Version) -> BaseRecord | None:
    """The record of the base that a version was trained on; None when its manifest names none."""
    record = version.manifest.base.record
    return read(Layout(version.path.parents[2]), record) if record else None


def relation_of(version: Version, other: str) -> Relation | None:
    """What was measured between the base of a version and the base with the record id `other`, either way round."""
    ends = {version.manifest.base.record, other}
    found = relations(Layout(version.path.parents[2]))
    return next((relation for relation in found if {relation.child_id, relation.parent_id} == ends), None)


def relations(layout: Layout) -> list[Relation]:
    """Everything that was measured between bases. Raises AdapterDamaged."""
    wanted = ids(layout.relations)
    if not wanted:
        return []
    from peftkit.base.relations import decode  # numpy, which `peftkit list` does not need

    return [_decode(layout.relations / f"{relation_id}.json", decode) for relation_id in wanted]


def ids(folder: Path) -> list[str]:
    """The ids of the files in `bases/` or `relations/`, sorted."""
    if not folder.is_dir():
        return []
    stems = (entry.name.removesuffix(".json") for entry in os.scandir(folder) if entry.name.endswith(".json"))
    return sorted(filter(is_version_id, stems))


def problems(layout: Layout, only: Collection[str] | None = None) -> dict[str, list[str]]:
    """What is wrong with base records and relations (or with the base records `only`), by path below the root."""
    found: dict[str, list[str]] = {}
    for folder in (layout.bases, layout.relations):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if (only is None or (folder == layout.bases and path.stem in only)) and (
                sentence := _problem(layout, path)
            ):
                found[path.relative_to(layout.root).as_posix()] = [sentence]
    return found


def _problem(layout: Layout, path: Path) -> str | None:
    if not (path.suffix == ".json" and is_version_id(path.stem)) or path.is_symlink() or path.is_dir():
        return "It is no record; readers pass it over."
    try:
        if path.parent == layout.bases:
            read(layout, path.stem)
        else:
            from peftkit.base.relations import decode

            _decode(path, decode)
    except RegistryError as error:
        return f"{error.fact}." if os.path.lexists(path) else None  # otherwise it was collected just now
    return None


def _keep(folder: Path, data: bytes, tmp: Path) -> str:
    record_id = hashlib.sha256(data).hexdigest()[:16]
    path = folder / f"{record_id}.json"
    durable.make_folder(folder)
    try:
        durable.create_file(path, data, tmp)
    except FileExistsError:
        _read(path)
        durable.sync_folder(folder)  # its writer may have died between link and sync
    return record_id


def _decode(path: Path, decode: Callable[[bytes], _Record]) -> _Record:
    """The record or relation in this file. Raises AdapterDamaged, or RegistryError when it is of another format."""
    data = _read(path)
    with suppress(ValueError, AttributeError):
        check_format(strict_json(data).get("format", FORMAT), path)
    try:
        return decode(data)
    except BaseError as error:
        raise AdapterDamaged(
            f"{path}: {error.fact}",
            expected=f"a file as FORMAT.md defines it for {path.parent.name}/",
            hint=f"remove it (rm {path}) and publish an adapter of the same base again",
        ) from error


def _read(path: Path) -> bytes:
    try:
        data = read_plain(path, LARGEST_RECORD)
    except OSError as error:
        raise AdapterDamaged(
            f"{path} cannot be read: {error}",
            expected="a record that adapters of this registry name",
            hint="copy it from a backup, or publish an adapter of the same base again",
        ) from error
    if hashlib.sha256(data).hexdigest()[:16] != path.stem:
        raise AdapterDamaged(
            f"{path} was changed: its bytes give the id {hashlib.sha256(data).hexdigest()[:16]}",
            expected=path.stem,
            hint=f"remove it (rm {path}) and publish an adapter of the same base again",
        )
    return data


def describes(record: BaseRecord, base: Base) -> bool:
    """Whether the digests that a manifest states are those of the base record that it names."""
    return record.parts() == dict(base.parts) and record.fingerprint == base.fingerprint


def contradicted(record_id: str | None) -> RegistryError:
    """The error for a draft whose digests are not those of its base record."""
    return RegistryError(
        f"the parts and the fingerprint of the draft are not those of its base record {record_id}",
        expected="the digests that the record gives",
        hint="take them from the same identity as the record: identity.parts(), identity.fingerprint",
    )


def missing(named: str | None, given: str | None) -> RegistryError:
    """The error for a draft that names another base record than the one given, or one that nobody has."""
    return RegistryError(
        f"the draft names the base record {named}, which is neither given nor in this registry"
        if given is None
        else f"the draft names {f'the base record {named}' if named else 'no base record'}, and {given} is given",
        expected="the record of the base that the adapter was trained on",
        hint="publish(..., base=backbone.identity.record)",
    )
