"""Changes of a store on disk that others see: each returns only after it is safe from a crash.

Safe means: the bytes of a file were fsynced before the entry that names it, and the folder that holds the entry after
it. An error from fsync is never retried: after a failed fsync the kernel may drop the dirty pages, and report success
the next time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import IO

from peftkit.errors import RegistryError

_CHUNK = 1 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` (created, renamed, removed) durable."""
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
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


def write_file(path: Path, data: bytes) -> None:
    """Create `path`, read-only, holding `data`; the caller syncs the folder."""
    with _create(path) as stream:
        _write(stream.fileno(), data)
        _finish(stream.fileno())


def create_file(path: Path, data: bytes, tmp: Path) -> None:
    """Put `data` at `path` as one step, or raise FileExistsError; of two processes, one wins.

    Raises RegistryError on a file system without hard links.
    """
    building = tmp / f"{path.name}-{secrets.token_hex(8)}"
    try:
        write_file(building, data)
        os.link(building, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise RegistryError(
            f"the file system of {path.parent} has no hard links: {error.strerror}",
            expected="a file system such as ext4, xfs, btrfs or NTFS; exFAT and FAT have none",
            hint="move the registry, and name its folder with --registry or PEFTKIT_REGISTRY",
        ) from error
    finally:
        if building.exists():
            os.unlink(building)
    sync_folder(path.parent)


def move_folder(source: Path, target: Path) -> None:
    """Rename a complete folder into place."""
    os.rename(source, target)
    sync_folder(target.parent)


def remove(path: Path, tmp: Path) -> None:
    """Take a file or a folder out of sight as one step, then delete it."""
    leaving = tmp / f"removed-{path.name}-{secrets.token_hex(8)}"
    os.rename(path, leaving)
    sync_folder(path.parent)
    delete(leaving)


def delete(path: Path) -> None:
    """Delete what no reader sees."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def copy_file(source: Path, target: Path, limit: int | None = None) -> tuple[str, int]:
    """Copy a plain file, read-only; the digest and size returned are those of the bytes written, not read again.

    Raises RegistryError for a link, a pipe or a device in the place of the file, and after `limit` bytes.
    """
    # O_NOFOLLOW and O_NONBLOCK: a link or a pipe may have taken the file's place since the folder was looked through.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as reading:
        if not stat.S_ISREG(os.fstat(reading.fileno()).st_mode):
            raise RegistryError(
                f"{source} is not a plain file", expected="a plain file", hint="leave it out of the folder"
            )
        digest = hashlib.sha256()
        size = 0
        with _create(target) as writing:
            while chunk := reading.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if limit is not None and size > limit:
                    raise RegistryError(f"{source} has more than {limit} bytes", expected=f"at most {limit} bytes")
                _write(writing.fileno(), chunk)
            _finish(writing.fileno())
    return digest.hexdigest(), size


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _create(path: Path) -> IO[bytes]:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb", buffering=0)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _finish(descriptor: int) -> None:
    os.fchmod(descriptor, 0o444)
    os.fsync(descriptor)
