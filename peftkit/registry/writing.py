"""One writer at a time: the lock of a registry, the folders that every write needs, and errors that say who and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from peftkit import durable
from peftkit.canonical import canonical_json
from peftkit.errors import RegistryError
from peftkit.process import identity, is_alive
from peftkit.registry import manifest
from peftkit.registry.layout import FORMAT, Layout

MARKER = canonical_json({"format": FORMAT}) + b"\n"
"""The bytes of `registry.json`."""


@contextmanager
def writing(layout: Layout, purpose: str, timeout: float) -> Iterator[None]:
    """Hold the lock, creating the registry if needed; an OSError becomes a RegistryError.

    Raises RegistryError when another process holds the lock for `timeout` seconds, naming it.
    """
    try:
        for folder in (*reversed(layout.root.parents), layout.root):
            if not folder.is_dir():
                durable.make_folder(folder)
        # Without flock filelock would take a lock file instead, which outlives a killed process.
        with FileLock(layout.lock, timeout=timeout, fallback_to_soft=False):
            _sign(layout.lock, purpose)
            check_root_format(layout)
            durable.make_folder(layout.tmp)
            if not layout.marker.is_file():
                _begin(layout)
            yield
    except Timeout as error:
        raise RegistryError(
            f"{layout.lock} has been locked for {timeout:g} seconds by {_holder(layout.lock)}",
            expected="one writer at a time; a lock ends with its process",
            hint="wait for the other peftkit to finish, then run this again",
        ) from error
    except OSError as error:
        raise RegistryError(
            f"could not {purpose} in {layout.root}: {error}",
            expected="a file system that can be written to and locked; the registry is in its old or its new state",
            hint="peftkit list shows which; free the disk or mend its rights, then run this again",
        ) from error


def _begin(layout: Layout) -> None:
    """Create the marker, once the folders above it are durable: whoever created them may have died before."""
    for folder in layout.root.absolute().parents:
        with suppress(PermissionError):  # nobody creates a folder below one that it cannot open
            durable.sync_folder(folder)
        if os.path.ismount(folder):
            break
    with suppress(FileExistsError):
        durable.create_file(layout.marker, MARKER, layout.tmp)


def check_root_format(layout: Layout) -> None:
    """Stop at a registry of another format; a folder that is missing, or holds no adapter, is an empty registry."""
    path = layout.marker
    if path.is_file():
        written = path.read_bytes()
        if written == MARKER:
            return
        try:
            found = json.loads(written)["format"]
        except (ValueError, KeyError, TypeError):
            found = written[:40]
        manifest.check_format(written[:40] if found == FORMAT else found, path)
    elif layout.root.is_dir() and any((entry / "versions").is_dir() for entry in layout.root.iterdir()):
        if path.is_file():  # the first writer was at work: it writes this file before any adapter
            check_root_format(layout)
            return
        raise RegistryError(
            f"{layout.root} holds adapters and no {path.name}, so their format is unknown",
            expected=f"{path}, as it was written with the first adapter",
            hint=f"if they are of format {FORMAT}: echo '{MARKER.decode().strip()}' > {path}",
        )


def _sign(lock: Path, purpose: str) -> None:
    """Say in the lock file who holds it; it serves people only, so nothing is fsynced and failing is no harm."""
    with suppress(OSError):
        lock.write_text(json.dumps({**identity(os.getpid()), "purpose": purpose, "since": manifest.timestamp()}))


def _holder(lock: Path) -> str:
    try:
        found = json.loads(lock.read_text())
        who = f"process {int(found['pid'])} on {found['host']} ({found['purpose']}, since {found['since']})"
        return who if is_alive(found) else f"a child of {who}, which has ended"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
