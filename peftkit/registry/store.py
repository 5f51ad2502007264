"""The registry: publish, find and tag adapters. FORMAT.md states what each write keeps true."""

from __future__ import annotations

import builtins
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from peftkit.canonical import strict_json
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry import durable, lookup, manifest, payload, verify
from peftkit.registry.layout import (
    FORMAT,
    LATEST,
    MANIFEST,
    Layout,
    check_alias,
    check_name,
    is_alias,
    is_name,
    is_version_id,
    parse_reference,
)
from peftkit.registry.manifest import Draft, Manifest, Version

__all__ = ["Draft", "Manifest", "Move", "Registry", "Version"]


@dataclass(frozen=True)
class Move:
    """One line of an adapter's alias history; `previous` is None when the alias was new."""

    time: str
    alias: str
    version: str
    previous: str | None


class Registry:
    """A folder of adapters with versions and aliases; creating the object touches nothing on disk."""

    def __init__(self, root: Path, *, lock_timeout: float = 60.0) -> None:
        self.root = Path(root)
        self._layout = Layout(self.root)
        self._lock_timeout = lock_timeout

    def publish(self, name: str, payload: Path, manifest: Draft, aliases: Sequence[str] = ()) -> Version:
        """Copy every file of the folder `payload` into a new version, and point `latest` and `aliases` at it.

        Content that is already there (same files, same draft) gives the existing version. Everything that can be
        refused is refused before anything is written.
        """
        check_name(name)
        wanted = list(dict.fromkeys([LATEST, *map(check_alias, aliases)]))
        relatives = _inspect(Path(payload), manifest.kind)
        with self._writing(f"publish {name}"):
            for folder in (self._layout.adapter(name), self._layout.versions(name), self._layout.aliases(name)):
                durable.make_folder(folder)
            version = self._add(name, Path(payload), relatives, manifest)
            for alias in wanted:
                self._point(name, alias, version.id)
        return version

    def resolve(self, reference: str) -> Version:
        """The version that `name` (its latest), `name@alias` or `name@` and the start of a version id points at."""
        wanted = parse_reference(reference)
        self._check_format()
        known = self.version_ids(wanted.name)
        if not known:
            raise lookup.unknown_name(wanted.name, self.root, self.names())
        if wanted.prefix is not None:
            return self._load(wanted.name, lookup.by_prefix(wanted.name, wanted.prefix, known))
        alias = wanted.alias or LATEST
        path = self._layout.alias(wanted.name, alias)
        if not path.is_file():
            raise lookup.unknown_alias(wanted.name, alias, known, self.aliases(wanted.name))
        target = lookup.read_alias(wanted.name, path)
        if target not in known:
            raise AdapterDamaged(
                f"{wanted.name}@{alias} points at the version {target}, which is not there",
                expected=f"one of {', '.join(known)}",
                hint=f"peftkit tag {wanted.name}@{known[0]} {alias}",
            )
        return self._load(wanted.name, target)

    def names(self) -> builtins.list[str]:
        """The names of all adapters, sorted."""
        self._check_format()
        if not self.root.is_dir():
            return []
        found = [entry.name for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        # A name whose first publish was cut off has no alias `latest` yet, and is not there (FORMAT.md, section 2).
        return sorted(name for name in found if is_name(name) and self._layout.alias(name, LATEST).is_file())

    def versions(self, name: str) -> builtins.list[Version]:
        """All versions of one name, newest first."""
        self._check_format()
        known = self.version_ids(name)
        if not known:
            raise lookup.unknown_name(name, self.root, self.names())
        found = [self._load(name, version_id) for version_id in known]
        return sorted(found, key=lambda version: (version.manifest.created, version.id), reverse=True)

    def version_ids(self, name: str) -> builtins.list[str]:
        """The ids of all versions of one name, sorted, without reading a manifest; empty for an unknown name."""
        folder = self._layout.versions(name)
        if not folder.is_dir():
            return []
        return sorted(e.name for e in os.scandir(folder) if is_version_id(e.name) and e.is_dir(follow_symlinks=False))

    def aliases(self, name: str) -> dict[str, str]:
        """Which version id each alias of one name points at; empty for an unknown name."""
        self._check_format()
        folder = self._layout.aliases(name)
        if not folder.is_dir():
            return {}
        return {path.name: lookup.read_alias(name, path) for path in sorted(folder.iterdir()) if is_alias(path.name)}

    def tag(self, reference: str, alias: str) -> Version:
        """Point `alias` at the version of `reference`, whether the alias is new or moves."""
        check_alias(alias)
        self.resolve(reference)  # so that a wrong reference writes nothing, not even the lock file
        with self._writing(f"tag {reference}"):
            version = self.resolve(reference)
            durable.make_folder(self._layout.aliases(version.name))
            self._point(version.name, alias, version.id)
        return version

    def list(self) -> builtins.list[Version]:
        """The latest version of every name."""
        return [self.resolve(name) for name in self.names()]

    def history(self, name: str) -> builtins.list[Move]:
        """The moves of the aliases of one name, oldest first; a line that a crash tore is passed over."""
        path = self._layout.history(name)
        moves = []
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                moves.append(Move(**strict_json(line)))
            except (ValueError, TypeError):
                continue
        return moves

    def clear_leftovers(self) -> builtins.list[str]:
        """Delete what interrupted writers left in `tmp/`, and return its names."""
        if not self._layout.tmp.is_dir():
            return []
        with self._writing("clear leftovers"):
            found = sorted(self._layout.tmp.iterdir())
            for path in found:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        return [path.name for path in found]

    def _add(self, name: str, source: Path, relatives: builtins.list[str], draft: Draft) -> Version:
        """Build the version in `tmp/` and rename it into place; a version that is there already is left alone."""
        building = self._layout.tmp / f"{name}-{secrets.token_hex(8)}"
        try:
            files = payload.copy(source, building, relatives)
            complete = manifest.complete(draft, name, files)
            final = self._layout.version(name, complete.id)
            if final.exists():
                self._check_built(final, complete, read_data=True)
                durable.sync_folder(final.parent)  # its publisher may have died between rename and sync
                return Version(name, complete.id, final, complete)
            durable.write_file(building / MANIFEST, manifest.encode(complete))
            durable.sync_folder(building)
            # The source may have changed since it was inspected: what counts is the copy.
            self._check_built(building, complete, read_data=False)
            os.rename(building, final)
            durable.sync_folder(final.parent)
            return Version(name, complete.id, final, complete)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    @staticmethod
    def _check_built(folder: Path, complete: Manifest, *, read_data: bool) -> None:
        problems = verify.check_folder(folder, complete.name, complete.id, read_data=read_data)
        if problems:
            raise AdapterDamaged(
                f"{folder} is damaged: {' '.join(problems)}",
                expected="the files that were published",
                hint=f"peftkit verify {complete.name}",
            )

    def _point(self, name: str, alias: str, version_id: str) -> None:
        path = self._layout.alias(name, alias)
        previous = path.read_text("ascii", "replace").strip() if path.is_file() else None
        if previous == version_id:
            return
        move = {"time": manifest.timestamp(), "alias": alias, "version": version_id, "previous": previous}
        durable.append_line(self._layout.history(name), json.dumps(move).encode("ascii"))
        durable.sync_folder(self._layout.adapter(name))
        durable.replace_file(path, f"{version_id}\n".encode("ascii"), self._layout.tmp)

    def _load(self, name: str, version_id: str) -> Version:
        path = self._layout.version(name, version_id)
        return Version(name, version_id, path, manifest.read(path, name, version_id))

    @contextmanager
    def _writing(self, purpose: str) -> Iterator[None]:
        """Hold the lock of the registry, creating the registry if needed; an OSError becomes a RegistryError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self._layout.lock, timeout=self._lock_timeout):
                self._check_format()
                durable.make_folder(self._layout.tmp)
                if not self._layout.marker.is_file():
                    text = json.dumps({"format": FORMAT}) + "\n"
                    durable.replace_file(self._layout.marker, text.encode("ascii"), self._layout.tmp)
                    durable.sync_folder(self.root.parent)
                yield
        except Timeout as error:
            raise RegistryError(
                f"{self._layout.lock} has been locked by another process for {self._lock_timeout:g} seconds",
                expected="one writer at a time; a lock ends with its process",
                hint="wait for the other peftkit to finish, then run this again",
            ) from error
        except OSError as error:
            raise RegistryError(
                f"could not {purpose} in {self.root}: {error}",
                expected="a file system that can be written to; the registry is in its old or its new state",
                hint="peftkit list shows which; free the disk or mend its rights, then run this again",
            ) from error

    def _check_format(self) -> None:
        """Stop at a registry of another format; a folder that is missing, or holds no adapter, is an empty registry."""
        path = self._layout.marker
        if path.is_file():
            try:
                found = strict_json(path.read_bytes())
            except ValueError as error:
                found = {"format": f"that cannot be read ({error})"}
            manifest.check_format(found.get("format") if isinstance(found, dict) else None, path)
        elif self.root.is_dir() and any((entry / "versions").is_dir() for entry in self.root.iterdir()):
            raise RegistryError(
                f"{self.root} holds adapters and no {path.name}, so their format is unknown",
                expected=f"{path}, as it was written with the first adapter",
                hint=f"""if they are of format {FORMAT}: echo '{{"format": {FORMAT}}}' > {path}""",
            )


def _inspect(folder: Path, kind: str) -> builtins.list[str]:
    # Apart from `publish`, whose parameter `payload` hides the module of that name.
    try:
        return payload.inspect(folder, kind)
    except OSError as error:
        raise RegistryError(
            f"{folder} cannot be read: {error}", expected="a folder whose files can be read", hint=f"ls -lR {folder}"
        ) from error
