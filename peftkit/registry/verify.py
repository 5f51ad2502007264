"""Is a version still what was published? Problems come back as sentences; nothing is raised and nothing is mended."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from peftkit.canonical import strict_json
from peftkit.errors import RegistryError
from peftkit.registry import manifest as manifests
from peftkit.registry.durable import digest_file
from peftkit.registry.headers import header_problems
from peftkit.registry.layout import LATEST, MANIFEST, REQUIRED_FILES, Layout, is_alias, is_name, is_version_id
from peftkit.registry.manifest import File, Version


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
    """All problems of a registry, by reference (`name@id`, `name@alias`, `name`); empty when it is sound."""
    layout = Layout(root)
    problems: dict[str, list[str]] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_symlink() or not folder.is_dir() or folder == layout.tmp:
            continue
        if is_name(folder.name):
            problems |= _adapter_problems(layout, folder.name, read_data)
        elif (folder / "versions").is_dir():
            problems[folder.name] = [f"{folder.name!r} cannot be the name of an adapter; readers pass it over."]
    return problems


def _adapter_problems(layout: Layout, name: str, read_data: bool) -> dict[str, list[str]]:
    problems: dict[str, list[str]] = {}
    versions = layout.versions(name)
    known = sorted(entry.name for entry in versions.iterdir()) if versions.is_dir() else []
    for version_id in known:
        if is_version_id(version_id):
            problems[f"{name}@{version_id}"] = check_folder(
                versions / version_id, name, version_id, read_data=read_data
            )
        else:
            problems[f"{name}@{version_id}"] = [f"{version_id!r} is no version id; readers pass it over."]
    aliases = layout.aliases(name)
    named = sorted(aliases.iterdir()) if aliases.is_dir() else []
    for path in named:
        problems[f"{name}@{path.name}"] = _alias_problems(path, known)
    if known and LATEST not in {path.name for path in named}:
        problems[name] = [f"It has no alias {LATEST!r}: its first publish was cut off before the end."]
    return {reference: found for reference, found in problems.items() if found}


def _alias_problems(path: Path, known: list[str]) -> list[str]:
    if not is_alias(path.name):
        return [f"{path.name!r} cannot be an alias; readers pass it over."]
    try:
        target = path.read_bytes()
    except OSError as error:
        return [f"The alias {path.name!r} cannot be read: {error}."]
    if target.decode("latin-1") not in {f"{version_id}\n" for version_id in known}:
        return [f"The alias {path.name!r} holds {target[:40]!r}, which is no version here."]
    return []


def _walk(folder: Path) -> tuple[set[str], list[str]]:
    """The plain files below `folder`, and a sentence for everything else; links are never followed."""
    found: set[str] = set()
    problems: list[str] = []
    for parent, folders, files in os.walk(folder):
        for entry in sorted(folders + files):
            path = Path(parent, entry)
            mode = path.lstat().st_mode
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                found.add(relative)
            elif not stat.S_ISDIR(mode):
                problems.append(f"{relative} is not a plain file.")
            elif not any(path.iterdir()):
                problems.append(f"{relative} is an empty folder that was not published.")
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
