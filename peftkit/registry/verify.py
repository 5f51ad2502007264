"""Is a version still what was published? Problems come back as sentences; nothing is raised and nothing is mended."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from peftkit.canonical import strict_json
from peftkit.durable import digest_file
from peftkit.errors import RegistryError
from peftkit.registry import aliases, bases
from peftkit.registry import manifest as manifests
from peftkit.registry.headers import header_problems
from peftkit.registry.layout import (
    LATEST,
    MANIFEST,
    REQUIRED_FILES,
    Layout,
    is_alias,
    is_name,
    is_record_name,
    is_version_id,
)
from peftkit.registry.manifest import File, Version
from peftkit.registry.writing import check_root_format


def check(version: Version, read_data: bool = True) -> list[str]:
    """What is wrong with a version on disk now; empty when nothing is.

    Without `read_data` digests are not compared: presence, size and headers only, which does not read the tensors.
    """
    return check_folder(version.path, version.name, version.id, read_data=read_data)


def check_folder(folder: Path, name: str, version_id: str, *, read_data: bool = True) -> list[str]:
    """The same as `check` for a version whose manifest may be unreadable."""
    try:
        manifest = manifests.read(folder, name, version_id)
    except RegistryError as error:
        return [f"{error.fact}."]
    found, problems = _walk(folder)
    found.discard(MANIFEST)
    for relative in REQUIRED_FILES[manifest.kind]:
        if relative not in manifest.files:
            problems.append(f"The manifest does not name {relative}, which kind {manifest.kind!r} needs.")
    problems += [f"{relative} is not in the manifest." for relative in sorted(found - set(manifest.files))]
    for relative, promised in sorted(manifest.files.items()):
        if relative in found:
            problems += _file_problems(folder, relative, promised, read_data)
        else:
            problems.append(f"{relative} is missing.")
    return problems


def check_adapter(root: Path, name: str, *, read_data: bool = True) -> dict[str, list[str]]:
    """All problems of one adapter: its versions, their base records, and the history of its aliases."""
    layout = Layout(root)
    found = _adapter_problems(layout, name, read_data) | bases.problems(layout, _records_of(layout, name))
    return {where: problems for where, problems in found.items() if problems}


def check_version(version: Version, *, read_data: bool = True) -> list[str]:
    """What is wrong with a version, or with the base record that it names."""
    layout, record = Layout(version.path.parents[2]), version.manifest.base.record
    damaged = bases.problems(layout, {record} if record else set())
    return [
        *check(version, read_data),
        *_record_problems(layout, version.path, version.name, version.id),
        *(f"{where}: {sentence}" for where, found in damaged.items() for sentence in found),
    ]


def content_problems(path: Path) -> list[str]:
    """What is wrong inside a payload file, whatever its digest: a bad safetensors header, bad JSON."""
    if path.name.endswith(".safetensors"):
        return header_problems(path)
    try:
        strict_json(path.read_bytes())
    except ValueError as error:
        return [f"is not JSON: {error}"]
    return []


def check_root(root: Path, *, read_data: bool = True) -> dict[str, list[str]]:
    """All problems of a registry, by reference (`name@id`, `name@alias`, `name`) or path; empty when it is sound."""
    layout = Layout(root)
    problems: dict[str, list[str]] = {}
    try:
        check_root_format(layout)
    except RegistryError as error:
        problems[layout.marker.name] = [f"{error.fact}."]
    own = {layout.tmp, layout.bases, layout.relations, layout.marker, layout.lock}
    for folder in (layout.tmp, layout.bases, layout.relations):
        if folder.is_symlink():
            problems[folder.name] = ["It is a symbolic link; nothing is removed through it."]
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        if entry in own or entry.name.startswith(layout.index.name) or not entry.is_dir():
            continue  # a README or a .gitignore may stand beside the adapters
        if entry.is_symlink():
            problems[entry.name] = ["It is a symbolic link; readers pass it over."]
        elif is_name(entry.name):
            try:
                problems |= _adapter_problems(layout, entry.name, read_data)
            except FileNotFoundError:
                if entry.exists():  # otherwise the adapter was removed just now
                    raise
        elif (entry / "versions").is_dir():
            problems[entry.name] = [f"{entry.name!r} cannot be the name of an adapter; readers pass it over."]
    return {where: found for where, found in (problems | bases.problems(layout)).items() if found}


def _adapter_problems(layout: Layout, name: str, read_data: bool) -> dict[str, list[str]]:
    problems: dict[str, list[str]] = {}
    versions = layout.versions(name)
    known = sorted(entry.name for entry in versions.iterdir()) if versions.is_dir() else []
    for version_id in known:
        if is_version_id(version_id):
            folder = versions / version_id
            found = check_folder(folder, name, version_id, read_data=read_data)
            found += _record_problems(layout, folder, name, version_id)
            problems[f"{name}@{version_id}"] = found if folder.exists() else []  # it may have been removed just now
        else:
            problems[f"{name}@{version_id}"] = [f"{version_id!r} is no version id; readers pass it over."]
    for folder in (versions, layout.aliases(name)):
        if folder.is_symlink():
            problems[f"{name}/{folder.name}"] = ["It is a symbolic link; nothing is removed through it."]
    for extra in sorted({entry.name for entry in layout.adapter(name).iterdir()} - {"versions", "aliases"}):
        problems[f"{name}/{extra}"] = ["It is not part of a registry."]
    folder = layout.aliases(name)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        problems[f"{name}@{path.name}"] = _alias_problems(layout, name, path)
    if known and not aliases.numbers(layout, name, LATEST):
        problems[name] = [f"It has no alias {LATEST!r}: its first publish was cut off before the end."]
    return problems


def _records_of(layout: Layout, name: str) -> set[str]:
    """The base records that the versions of a name name, as far as their manifests can be read."""
    found = set()
    for entry in layout.versions(name).iterdir():
        with suppress(RegistryError):
            found.add(manifests.read(entry, name, entry.name).base.record)
    return {record for record in found if record is not None}


def _record_problems(layout: Layout, folder: Path, name: str, version_id: str) -> list[str]:
    try:
        base = manifests.read(folder, name, version_id).base
    except RegistryError:
        return []  # `check_folder` says so
    if base.record is None:
        return []
    if base.record not in bases.ids(layout.bases):
        return [f"It names the base record {base.record}, which is missing."]
    try:
        fits = bases.describes(bases.read(layout, base.record), base)
    except RegistryError:
        return []  # `bases.problems` says so, once for all versions that name it
    return [] if fits else [f"Its digests are not those of the base record {base.record} that it names."]


def _alias_problems(layout: Layout, name: str, path: Path) -> list[str]:
    if not is_alias(path.name):
        return [f"{path.name!r} cannot be an alias; readers pass it over."]
    if path.is_symlink() or not path.is_dir():
        return ["It is not a folder of records."]
    strange = sorted(entry.name for entry in path.iterdir() if not is_record_name(entry.name))
    return [
        *(f"{entry!r} is no record; readers pass it over." for entry in strange),
        *aliases.problems(layout, name, path.name),
    ]


def _walk(folder: Path) -> tuple[set[str], list[str]]:
    """The plain files below `folder`, and a sentence for everything else; links are never followed."""
    found: set[str] = set()
    problems: list[str] = []
    for parent, folders, files in os.walk(folder):
        for entry in sorted(folders + files):
            path = Path(parent, entry)
            relative = path.relative_to(folder).as_posix()
            try:
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    found.add(relative)
                elif not stat.S_ISDIR(mode):
                    problems.append(f"{relative} is not a plain file.")
                elif not any(path.iterdir()):
                    problems.append(f"{relative} is an empty folder that was not published.")
            except OSError as error:  # among others: the version is being removed
                problems.append(f"{relative} cannot be read: {error}.")
    return found, problems


def _file_problems(folder: Path, relative: str, promised: File, read_data: bool) -> list[str]:
    path = folder / relative
    try:
        size = path.stat().st_size
        if size != promised.bytes:
            return [f"{relative} has {size} bytes, {promised.bytes} were published."]
        if read_data and (digest := digest_file(path)) != promised.sha256:
            return [f"{relative} has the digest {digest}, {promised.sha256} was published."]
        return [f"{relative} {problem}." for problem in content_problems(path)]
    except OSError as error:
        return [f"{relative} cannot be read: {error}."]
