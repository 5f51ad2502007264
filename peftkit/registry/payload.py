"""Which files of a folder become an adapter: looked through first, then copied with their digests."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from peftkit.durable import copy_file, sync_folder
from peftkit.errors import RegistryError
from peftkit.registry.layout import REQUIRED_FILES, check_file
from peftkit.registry.manifest import File
from peftkit.registry.verify import content_problems


def inspect(folder: Path, kind: str) -> list[str]:
    """The relative paths of all files to copy; RegistryError if one of them must not enter a registry."""
    if not folder.is_dir():
        raise RegistryError(
            f"{folder} is not a folder", expected="a folder with the files of an adapter", hint="give the folder itself"
        )
    found = sorted(_plain_files(folder, folder))
    missing = [name for name in REQUIRED_FILES[kind] if name not in found]
    if missing:
        raise RegistryError(
            f"{folder} lacks {' and '.join(missing)}; it holds {', '.join(found) or 'nothing'}",
            expected=f"{' and '.join(REQUIRED_FILES[kind])} for kind {kind!r}",
            hint="save the adapter with safetensors, or publish it with the other kind",
        )
    seen: dict[str, str] = {}
    for relative in found:
        twin = seen.setdefault(relative.lower(), relative)
        if twin != relative:
            raise RegistryError(
                f"{twin!r} and {relative!r} differ only in case",
                expected="names that stay apart on every file system",
                hint="rename one of them",
            )
        if problems := content_problems(folder / relative):
            raise RegistryError(
                f"{folder / relative} {problems[0]}", expected="a sound file", hint="save the adapter again"
            )
    return found


def copy(source: Path, target: Path, relatives: list[str]) -> dict[str, File]:
    """Copy the files into the new folder `target` and return what the manifest says about them.

    Everything below `target` is durable then; the caller syncs `target` once the manifest is in it.
    """
    target.mkdir()
    files: dict[str, File] = {}
    folders: set[Path] = set()
    for relative in relatives:
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.update(parent for parent in path.parents if target in parent.parents)
        digest, size = copy_file(source / relative, path)
        files[relative] = File(sha256=digest, bytes=size)
    for folder in sorted(folders, reverse=True):
        sync_folder(folder)
    return files


def _plain_files(folder: Path, top: Path) -> list[str]:
    found: list[str] = []
    for entry in os.scandir(folder):
        path = Path(entry.path)
        relative = path.relative_to(top).as_posix()
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            found += _plain_files(path, top)
        elif not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
            raise RegistryError(
                f"{path} is {kind}", expected="plain files only", hint="copy the file itself into the folder"
            )
        else:
            found.append(check_file(relative))
    return found
