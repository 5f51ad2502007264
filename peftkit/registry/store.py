"""The registry: publish, find and tag adapters. FORMAT.md states what each write keeps true."""

from __future__ import annotations

import builtins
import errno
import os
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from peftkit import durable
from peftkit.base.record import BaseRecord
from peftkit.errors import AdapterDamaged, AdapterNotFound, RegistryError
from peftkit.registry import aliases as alias_records
from peftkit.registry import bases, lookup, manifest, payload, verify
from peftkit.registry.aliases import Move
from peftkit.registry.layout import LATEST, MANIFEST, Layout, check_alias, check_name, is_version_id, parse_reference
from peftkit.registry.layout import is_name as _is_name
from peftkit.registry.manifest import Draft, Manifest, Version
from peftkit.registry.writing import check_root_format, writing

__all__ = ["Draft", "Manifest", "Move", "Registry", "Version"]


class Registry:
    """A folder of adapters with versions and aliases; creating the object touches nothing on disk."""

    def __init__(self, root: Path, *, lock_timeout: float = 60.0) -> None:
        self.root = Path(root)
        self.layout = Layout(self.root)
        self._lock_timeout = lock_timeout

    def publish(
        self, name: str, payload: Path, manifest: Draft, aliases: Sequence[str] = (), *, base: BaseRecord | None = None
    ) -> Version:
        """Copy every file of the folder `payload` into a new version, and point `latest` and `aliases` at it.

        `base` is stored first when it is given. Content that is already there (same files, same draft) gives the
        existing version. Everything that can be refused is refused before anything is written.
        """
        check_name(name)
        wanted = list(dict.fromkeys([LATEST, *map(check_alias, aliases)]))
        relatives = _inspect(Path(payload), manifest.kind)
        self._check_record(manifest, base)
        with self.writing(f"publish {name}"):
            self._check_record(manifest, base)  # again: it may have been collected since
            if base is not None:
                bases.keep(self.layout, base)
            elif manifest.base.record is not None:
                durable.sync_folder(self.layout.bases)  # whoever stored the record may have died before syncing it
            durable.make_folder(self.layout.adapter(name))
            durable.make_folder(self.layout.versions(name))
            version = self._add(name, Path(payload), relatives, manifest)
            for alias in wanted:
                alias_records.move(self.layout, name, alias, version.id)
        return version

    def resolve(self, reference: str) -> Version:
        """The version that `name` (its latest), `name@alias` or `name@` and the start of a version id points at."""
        wanted = parse_reference(reference)
        check_root_format(self.layout)
        if wanted.prefix is not None:
            known = self._known(wanted.name)
            return self.load(wanted.name, lookup.by_prefix(wanted.name, wanted.prefix, known))
        alias = wanted.alias or LATEST
        move = alias_records.current(self.layout, wanted.name, alias)
        while True:
            if move is None or move.version is None:
                known = self._known(wanted.name)
                raise lookup.unknown_alias(wanted.name, alias, known, self.aliases(wanted.name))
            try:
                return self.load(wanted.name, move.version)
            except AdapterNotFound as error:
                # A reader holds no lock: the alias may have moved on, and its old version been removed, in between.
                before, move = move, alias_records.current(self.layout, wanted.name, alias)
                if move == before:
                    known = self._known(wanted.name)
                    raise AdapterDamaged(
                        f"{wanted.name}@{alias} points at the version {move.version}, which is not there",
                        expected=f"one of {', '.join(known)}",
                        hint=f"peftkit tag {wanted.name}@{known[0]} {alias}",
                    ) from error

    def load(self, name: str, version_id: str) -> Version:
        """The version with this full id. Raises AdapterDamaged when its manifest is not what was published."""
        path = self.layout.version(name, version_id)
        try:
            return Version(name, version_id, path, manifest.read(path, name, version_id))
        except AdapterDamaged as error:
            if path.exists():
                raise
            raise lookup.removed(name, version_id, self.version_ids(name)) from error

    def names(self) -> builtins.list[str]:
        """The names of all adapters, sorted."""
        check_root_format(self.layout)
        if not self.root.is_dir():
            return []
        found = [entry.name for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        # A name whose first publish was cut off has no alias `latest` yet, and is not there (FORMAT.md, section 2).
        return sorted(n for n in found if _is_name(n) and alias_records.numbers(self.layout, n, LATEST))

    def versions(self, name: str) -> builtins.list[Version]:
        """All versions of one name, newest first."""
        check_root_format(self.layout)
        found = []
        for version_id in self._known(name):
            with suppress(AdapterNotFound):  # removed just now
                found.append(self.load(name, version_id))
        return sorted(found, key=lambda version: (version.manifest.created, version.id), reverse=True)

    def version_ids(self, name: str) -> builtins.list[str]:
        """The ids of all versions of one name, sorted, without reading a manifest; empty for an unknown name."""
        folder = self.layout.versions(name)
        if not folder.is_dir():
            return []
        return sorted(e.name for e in os.scandir(folder) if is_version_id(e.name) and e.is_dir(follow_symlinks=False))

    def aliases(self, name: str) -> dict[str, str]:
        """Which version id each alias of one name points at; empty for an unknown name."""
        check_root_format(self.layout)
        moves = (alias_records.current(self.layout, name, alias) for alias in alias_records.names(self.layout, name))
        return {move.alias: move.version for move in moves if move is not None and move.version is not None}

    def tag(self, reference: str, alias: str) -> Version:
        """Point `alias` at the version of `reference`, whether the alias is new or moves."""
        check_alias(alias)
        self.resolve(reference)  # so that a wrong reference writes nothing, not even the lock file
        with self.writing(f"tag {reference}"):
            version = self.resolve(reference)
            alias_records.move(self.layout, version.name, alias, version.id)
        return version

    def untag(self, name: str, alias: str) -> None:
        """Remove an alias; its history stays. Raises RegistryError for `latest`, which every adapter has."""
        if check_alias(alias) == LATEST:
            raise RegistryError(
                f"{name}@{LATEST} cannot be removed",
                expected="an alias that you made",
                hint=f"peftkit restore {name} {LATEST} moves it back; peftkit rm {name} --all removes the adapter",
            )
        if alias not in self.aliases(name):
            raise lookup.unknown_alias(name, alias, self._known(name), self.aliases(name))
        with self.writing(f"remove the alias {name}@{alias}"):
            alias_records.move(self.layout, name, alias, None)

    def restore(self, name: str, alias: str = LATEST, *, to: int | None = None) -> Version:
        """Roll an alias back to where it pointed before its last move, or at record number `to`.

        The move is a new record: nothing of the history is lost, and restoring twice comes back. Raises
        AdapterNotFound when there is no such record or its version was removed.
        """
        self._known(name)
        with self.writing(f"restore {name}@{alias}"):
            if not alias_records.numbers(self.layout, name, alias):
                raise lookup.unknown_alias(name, alias, self._known(name), self.aliases(name))
            target = _earlier(name, alias, alias_records.readable(self.layout, name, alias), to)
            if target not in self.version_ids(name):
                raise AdapterNotFound(
                    f"{name}@{alias} pointed at {target}, which has been removed",
                    expected=f"one of {', '.join(self.version_ids(name))}",
                    hint=f"peftkit log {name} shows all moves; peftkit restore {name} {alias} --to NUMBER",
                )
            alias_records.move(self.layout, name, alias, target)
        return self.load(name, target)

    def list(self) -> builtins.list[Version]:
        """The latest version of every name."""
        return [self.resolve(name) for name in self.names()]

    def history(self, name: str, alias: str | None = None) -> builtins.list[Move]:
        """The moves of one alias, or of all aliases of a name, oldest first. Raises AdapterDamaged."""
        check_root_format(self.layout)
        if alias is not None:
            return alias_records.history(self.layout, name, alias)
        moves = []
        for each in alias_records.names(self.layout, name):
            reached = ""  # a clock that was set back does not change the order of an alias's own moves
            for move in alias_records.history(self.layout, name, each):
                reached = max(reached, move.time)
                moves.append((reached, each, move.number, move))
        return [move for *_, move in sorted(moves, key=lambda entry: entry[:3])]

    def writing(self, purpose: str) -> AbstractContextManager[None]:
        """Hold the registry's lock for a block of writes."""
        return writing(self.layout, purpose, self._lock_timeout)

    def _known(self, name: str) -> builtins.list[str]:
        known = self.version_ids(name)
        if not known:
            raise lookup.unknown_name(name, self.root, self.names())
        return known

    def _check_record(self, draft: Draft, base: BaseRecord | None) -> None:
        wanted = draft.base.record
        if base is None and wanted in bases.ids(self.layout.bases):
            base = bases.read(self.layout, str(wanted))
        given = base.id if base is not None else None
        if wanted != given:
            raise bases.missing(wanted, given)
        if base is not None and not bases.describes(base, draft.base):
            raise bases.contradicted(wanted)

    def _add(self, name: str, source: Path, relatives: builtins.list[str], draft: Draft) -> Version:
        """Build the version in `tmp/` and rename it into place; a version that is there already is left alone."""
        building = self.layout.tmp / f"{name}-{secrets.token_hex(8)}"
        try:
            files = payload.copy(source, building, relatives)
            complete = manifest.complete(draft, name, files)
            written = manifest.encode(complete)
            version_id = manifest.compute_id(written)
            durable.write_file(building / MANIFEST, written)
            durable.sync_folder(building)
            return self.place(building, name, version_id, complete)
        finally:
            if building.exists():
                durable.delete(building)

    def place(self, building: Path, name: str, version_id: str, complete: Manifest) -> Version:
        """Rename a folder that was built and synced in `tmp/` to its version; the caller holds the lock.

        Moving an alias there makes it durable.
        """
        final = self.layout.version(name, version_id)
        if not final.exists():
            # The source may have changed since it was inspected: what counts is the copy.
            self._check_built(building, name, version_id, read_data=False)
            try:
                durable.move_folder(building, final)
                return Version(name, version_id, final, complete)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                # The same content was published at the same time, where the lock does not hold.
        self._check_built(final, name, version_id, read_data=True)
        return Version(name, version_id, final, complete)

    @staticmethod
    def _check_built(folder: Path, name: str, version_id: str, *, read_data: bool) -> None:
        problems = verify.check_folder(folder, name, version_id, read_data=read_data)
        if problems:
            raise AdapterDamaged(
                f"{folder} is damaged: {' '.join(problems)}",
                expected="the files that were published",
                hint=f"peftkit verify {name}",
            )


def _earlier(name: str, alias: str, moves: Sequence[Move], to: int | None) -> str:
    """The version id of record `to`, or of the record before the last one."""
    wanted = to if to is not None else (moves[-2].number if len(moves) > 1 else 0)
    found = next((move for move in moves if move.number == wanted), None)
    if found is None or found.version is None:
        numbered = ", ".join(str(move.number) for move in moves if move.version is not None) or "none"
        what = f"no record {wanted} with a version" if to is not None else "no earlier place to go back to"
        raise AdapterNotFound(
            f"{name}@{alias} has {what}",
            expected=f"a record number of it: {numbered}",
            hint=f"peftkit log {name} shows all moves",
        )
    return found.version


def _inspect(folder: Path, kind: str) -> builtins.list[str]:
    # Apart from `publish`, whose parameter `payload` hides the module of that name.
    try:
        return payload.inspect(folder, kind)
    except OSError as error:
        raise RegistryError(
            f"{folder} cannot be read: {error}", expected="a folder whose files can be read", hint=f"ls -lR {folder}"
        ) from error
