"""What importing hands on: the base that a user names, an adapter in quarantine, and the reading of small files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftkit.base.record import BaseRecord
from peftkit.errors import RegistryError
from peftkit.registry.manifest import Manifest
from peftkit.registry.reading import read_plain


@dataclass(frozen=True)
class ImportBase:
    """A base on this machine: its record, and how a manifest may name it elsewhere (a Hub id or a plain name)."""

    record: BaseRecord
    source: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Taken:
    """An adapter whose payload lies in quarantine; `written` are the bytes of its manifest."""

    manifest: Manifest
    written: bytes
    record: BaseRecord | None


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a plain file; RegistryError for a link, a pipe, a folder, or more than `limit` bytes."""
    try:
        return read_plain(path, limit)
    except OSError as error:
        raise RegistryError(
            f"{path} cannot be read: {error.strerror}",
            expected=f"a plain file of at most {limit} bytes that is no link",
            hint="copy the file itself into the folder, or export the adapter again",
        ) from error
