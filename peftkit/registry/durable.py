"""Writes that survive a crash: each returns only after the bytes, and the folder entry that names them, were fsynced.

An error from fsync is never retried: after a failed fsync the kernel may drop the dirty pages, and report success the
next time.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

from peftkit.errors import RegistryError

_CHUNK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` (created, renamed) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` if it is missing; its parent is synced either way: whoever created it may have died before."""
    if folder.is_symlink():
        raise RegistryError(
            f"{folder} is a symbolic link",
            expected="a folder inside the registry",
            hint=f"move it away: mv {folder} /tmp",
        )
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_file(path: Path, data: bytes) -> None:
    """Create `path`, read-only, holding `data`; the caller syncs the folder."""
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fchmod(stream.fileno(), 0o444)
        os.fsync(stream.fileno())


def replace_file(path: Path, data: bytes, tmp: Path) -> None:
    """Put `data` at `path` as one step: readers see the old bytes or the new ones."""
    building = tmp / f"{path.name}-{secrets.token_hex(8)}"
    try:
        write_file(building, data)
        os.replace(building, path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append one line; a line that an earlier crash tore is ended first, so it cannot swallow this one."""
    with open(path, "a+b") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(line + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def copy_file(source: Path, target: Path) -> tuple[str, int]:
    """Copy a plain file, read-only; the digest and size returned are those of the bytes written, not read again."""
    # O_NOFOLLOW and O_NONBLOCK: a link or a pipe may have taken the file's place since the folder was looked through.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as reading:
        if not stat.S_ISREG(os.fstat(reading.fileno()).st_mode):
            raise RegistryError(
                f"{source} is not a plain file", expected="a plain file", hint="leave it out of the folder"
            )
        digest = hashlib.sha256()
        size = 0
        with open(target, "xb") as writing:
            while chunk := reading.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                writing.write(chunk)
            writing.flush()
            os.fchmod(writing.fileno(), 0o444)
            os.fsync(writing.fileno())
    return digest.hexdigest(), size


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
