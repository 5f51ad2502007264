"""Import: an exported version comes back under the same id, a foreign PEFT checkpoint becomes a version of its own.

Both are copied into quarantine inside the registry and checked there, so what was hashed is what is loaded.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit import durable
from peftkit.base.record import BaseRecord, plain
from peftkit.errors import RegistryError
from peftkit.registry import aliases as alias_records
from peftkit.registry import bases
from peftkit.registry import manifest as manifests
from peftkit.registry.exchange import foreign, published
from peftkit.registry.exchange.taking import ImportBase, Taken
from peftkit.registry.layout import LATEST, MANIFEST, check_alias, check_name
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry

FindBase = Callable[[str], ImportBase | None]
"""Finds the base that an adapter's own config names, on this machine only; None when it is not here."""


@dataclass(frozen=True)
class _Wanted:
    source: Path
    name: str | None
    base: ImportBase | None
    bound: str
    origin: str


def import_adapter(
    registry: Registry,
    source: Path,
    *,
    name: str | None = None,
    base: ImportBase | None = None,
    find_base: FindBase | None = None,
    aliases: Sequence[str] = (),
    origin: str | None = None,
) -> Version:
    """Take the adapter in the untrusted folder `source` into the registry, and point `latest` and `aliases` at it.

    `origin` stands in the receipt instead of the folder's name. Raises RegistryError for what a rule refuses, and
    AdapterDamaged for bytes that differ from their manifest; the registry is then as before.
    """
    source = Path(source)
    wanted = list(dict.fromkeys([LATEST, *map(check_alias, aliases)]))
    if name is not None:
        check_name(name)
    asked = _Wanted(source, name, base, "user", plain(origin or source.absolute().name))
    exported = _is_exported(source)
    if not exported:
        asked = _with_base(asked, find_base)
    with registry.writing(f"import {plain(source.name, 80)}"):
        quarantine = registry.layout.tmp / f"import-{secrets.token_hex(8)}"
        try:
            taken = _published(registry, asked, quarantine) if exported else _foreign(asked, quarantine)
            return _place(registry, taken, quarantine, wanted)
        finally:
            if quarantine.exists():
                durable.delete(quarantine)


def _is_exported(source: Path) -> bool:
    try:
        (source / MANIFEST).lstat()
    except (OSError, ValueError):
        return False
    return True


def _with_base(asked: _Wanted, find_base: FindBase | None) -> _Wanted:
    if asked.base is not None:
        return asked
    foreign.refuse_no_adapter(asked.source)
    stated = foreign.stated_base(asked.source)
    found = find_base(stated) if stated is not None and find_base is not None else None
    if found is None:
        names = f"its config names {plain(stated)}, which is not on this machine" if stated else "its config names none"
        raise RegistryError(
            f"the base of {asked.origin} is not known: {names}",
            expected="the base that it was trained on",
            hint="add --base REF: a Hub id, a folder, a .gguf file or embedded:smollm2-135m",
        )
    return _Wanted(asked.source, asked.name, found, "config", asked.origin)


def _published(registry: Registry, asked: _Wanted, quarantine: Path) -> Taken:
    def known(record_id: str) -> BaseRecord | None:
        return bases.read(registry.layout, record_id) if record_id in bases.ids(registry.layout.bases) else None

    return published.take(asked.source, quarantine, asked.name, asked.base, known)


def _foreign(asked: _Wanted, quarantine: Path) -> Taken:
    assert asked.base is not None  # _with_base raised otherwise
    name = asked.name or foreign.legal_name(asked.origin)
    return foreign.take(asked.source, quarantine, name, asked.base, asked.bound, asked.origin)


def _place(registry: Registry, taken: Taken, quarantine: Path, aliases: Sequence[str]) -> Version:
    """Base record, version, aliases, in the order that FORMAT.md, section 2, gives."""
    layout, name = registry.layout, taken.manifest.name
    durable.write_file(quarantine / MANIFEST, taken.written)
    durable.sync_folder(quarantine)
    if taken.record is not None:
        bases.keep(layout, taken.record)
    durable.make_folder(layout.adapter(name))
    durable.make_folder(layout.versions(name))
    version = registry.place(quarantine, name, manifests.compute_id(taken.written), taken.manifest)
    for alias in aliases:
        alias_records.move(layout, name, alias, version.id)
    return version
