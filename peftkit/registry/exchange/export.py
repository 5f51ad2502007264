"""Export: a version as a folder that plain PEFT loads and that imports to the same id (FORMAT.md, section 7)."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftkit import durable
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry import bases, verify
from peftkit.registry.exchange.card import card
from peftkit.registry.layout import BASE_RECORD, MANIFEST
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry

CARD = "README.md"


@dataclass(frozen=True)
class Piece:
    """One file of an exported version: its path, what it holds, its bytes or where they lie, and their digest."""

    path: str
    holds: str
    size: int
    source: bytes | Path
    sha256: str | None = None
    """Of a payload file, as the manifest promises it."""


def pieces(registry: Registry, version: Version, license: str | None = None) -> tuple[Piece, ...]:
    """Everything that leaves when a version is exported, after every byte was checked.

    Raises AdapterDamaged when the version or its base record is not what was published.
    """
    if problems := verify.check(version, read_data=True):
        raise AdapterDamaged(
            f"{version.reference} is damaged:\n- " + "\n- ".join(problems),
            expected="the files that were published",
            hint=f"peftkit verify {version.name}; an earlier version can be exported: peftkit log {version.name}",
        )
    record_id = version.manifest.base.record
    record = bases.read(registry.layout, record_id) if record_id else None
    found = [_text(MANIFEST, "digests, settings and figures", (version.path / MANIFEST).read_bytes())]
    if record is not None:
        found.append(_text(BASE_RECORD, "the base's config, template and tensor digests", record.encode()))
    found.append(_text(CARD, "model card made from the manifest", card(version, license).encode("utf-8")))
    payload = [
        Piece(path, _holds(path), file.bytes, version.path / path, file.sha256)
        for path, file in sorted(version.manifest.files.items())
    ]
    return (*payload, *found)


def export(registry: Registry, reference: str, out: Path, license: str | None = None) -> tuple[Piece, ...]:
    """Write a version into the new folder `out` and return what was written.

    Raises RegistryError when `out` holds anything or lies inside the registry; `out` is complete or absent.
    """
    version = registry.resolve(reference)
    check_target(registry, Path(out))
    found = pieces(registry, version, license)
    try:
        _write(found, Path(out).absolute())
    except OSError as error:
        raise RegistryError(
            f"{version.reference} could not be exported to {out}: {error}",
            expected="a new or empty folder on a disk with room; nothing was left there",
            hint=f"peftkit export {version.name} --out OTHER",
        ) from error
    return found


def _text(path: str, holds: str, data: bytes) -> Piece:
    return Piece(path, holds, len(data), data)


def _holds(path: str) -> str:
    return "trained tensors" if path.endswith(".safetensors") else "the adapter's settings for PEFT"


def check_target(registry: Registry, out: Path) -> None:
    """Raise RegistryError unless `out` is a new or empty folder outside the registry."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RegistryError(f"{out} is not a folder", expected="a new or empty folder", hint="choose another folder")
    if out.is_dir() and (held := sorted(entry.name for entry in os.scandir(out))):
        raise RegistryError(
            f"{out} is not empty: it holds {', '.join(held[:5])}{' …' if len(held) > 5 else ''}",
            expected="a new or empty folder",
            hint="choose another folder; files are never written over",
        )
    if out.resolve() == Path.cwd():
        raise RegistryError(
            f"{out} is the folder you are in, which would be replaced under you",
            expected="a new or empty folder",
            hint="name a folder inside it",
        )
    if out.resolve().is_relative_to(registry.root.resolve()):
        raise RegistryError(
            f"{out} lies inside the registry {registry.root}",
            expected="a folder outside it",
            hint="choose another folder",
        )


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place, fsynced, when the block ends well, and is gone otherwise.

    Raises RegistryError when `out` was filled meanwhile.
    """
    missing = [parent for parent in out.parents if not parent.exists()]
    for parent in reversed(missing):
        durable.make_folder(parent)
    folder = out.parent / f".{out.name}-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        yield folder
        for each in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}, reverse=True):
            durable.sync_folder(each)
        _place(folder, out)
    finally:
        if folder.exists():
            durable.delete(folder)


def _write(found: tuple[Piece, ...], out: Path) -> None:
    with building(out) as folder:
        for piece in found:
            _put(piece, folder / piece.path)


def _put(piece: Piece, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(piece.source, bytes):
        durable.write_file(target, piece.source)
    else:
        digest, _ = durable.copy_file(piece.source, target, piece.size)
        if digest != piece.sha256:
            raise AdapterDamaged(
                f"{piece.source} changed while it was exported",
                expected=f"the digest {piece.sha256}",
                hint="peftkit verify NAME",
            )
    # Registry files are read-only because they never change; an exported copy belongs to the user.
    target.chmod(0o644)


def _place(building: Path, out: Path) -> None:
    """Rename into place; rename takes an empty folder's place as one step and refuses one that has been filled."""
    try:
        durable.move_folder(building, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise RegistryError(
            f"{out} was filled while the export was written",
            expected="a new or empty folder",
            hint="choose another folder",
        ) from error
