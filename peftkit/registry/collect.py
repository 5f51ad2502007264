"""Removing: single versions and adapters that nothing needs, and everything that interrupted writers left behind."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from peftkit import durable
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry import aliases as alias_records
from peftkit.registry import bases, lookup
from peftkit.registry.layout import LATEST, check_name, is_name, parse_reference
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry
from peftkit.registry.writing import check_root_format


@dataclass(frozen=True)
class Collected:
    """What `collect` removed, or would remove: paths below the root, and the bytes of their files."""

    paths: tuple[str, ...]
    bytes: int


def remove(registry: Registry, reference: str) -> str:
    """Remove one version, and return its `name@id`; a damaged one too, when it is named by its id.

    Raises RegistryError while an alias points at it or another version was made from it.
    """
    _locate(registry, reference)  # so that a wrong reference writes nothing, not even the lock file
    with registry.writing(f"remove {reference}"):
        _settle(registry)
        name, version_id = _locate(registry, reference)
        named = [alias for alias, target in registry.aliases(name).items() if target == version_id]
        if named:
            raise RegistryError(
                f"{name}@{version_id} is needed by {', '.join(f'{name}@{alias}' for alias in named)}",
                expected="a version that no alias points at",
                hint=_move_away(name, named[0], len(registry.version_ids(name))),
            )
        _refuse_parents(registry, {(name, version_id)})
        durable.remove(registry.layout.version(name, version_id), registry.layout.tmp)
    return f"{name}@{version_id}"


def remove_adapter(registry: Registry, name: str) -> list[str]:
    """Remove an adapter with all versions and aliases, damaged ones too, and return the ids of the versions.

    Raises RegistryError while an alias other than `latest` exists, or a version of another adapter was made from it.
    """
    if not registry.version_ids(check_name(name)):
        registry.resolve(name)  # says what there is
    with registry.writing(f"remove {name}"):
        _settle(registry)
        ids = registry.version_ids(name)
        others = sorted(set(registry.aliases(name)) - {LATEST})
        if others:
            raise RegistryError(
                f"{name} is needed by {', '.join(f'{name}@{alias}' for alias in others)}",
                expected=f"an adapter whose only alias is {LATEST}",
                hint=f"peftkit tag --remove {name} {others[0]}",
            )
        _refuse_parents(registry, {(name, version_id) for version_id in ids})
        durable.remove(registry.layout.adapter(name), registry.layout.tmp)
    return ids


def collect(registry: Registry, *, versions: bool = False, dry_run: bool = False) -> Collected:
    """Delete what interrupted writers left, and base records that no version and no relation names.

    With `versions` also every version that no alias points at and no other version was made from. With `dry_run`
    nothing is removed.
    """
    if not registry.root.is_dir():
        return Collected((), 0)
    with registry.writing("collect garbage"):
        layout = registry.layout
        _settle(registry)
        leftovers = sorted(layout.tmp.iterdir()) if layout.tmp.is_dir() else []
        unneeded = [version.path for version in _unneeded(registry)] if versions else []
        records = _unneeded_records(registry, set(unneeded))
        doomed = [*leftovers, *unneeded, *records]
        found = Collected(
            tuple(path.relative_to(layout.root).as_posix() for path in doomed), sum(map(_bytes_below, doomed))
        )
        if not dry_run:
            for path in leftovers:
                durable.delete(path)
            for path in [*unneeded, *records]:
                durable.remove(path, layout.tmp)
    return found


def _settle(registry: Registry) -> None:
    """Make durable what a removal is decided by: a writer that died may have left moves that a crash would undo."""
    layout = registry.layout
    _refuse_links(registry)
    for name in _all_names(registry):
        aliases = (layout.alias(name, alias) for alias in alias_records.names(layout, name))
        for folder in (layout.versions(name), *aliases):
            if folder.is_dir():
                durable.sync_folder(folder)


def _refuse_links(registry: Registry) -> None:
    """Raise RegistryError for a linked folder: what is removed through it would lie outside the registry."""
    layout = registry.layout
    folders = [layout.tmp, layout.bases, layout.relations]
    folders += [folder for name in _all_names(registry) for folder in (layout.versions(name), layout.aliases(name))]
    for folder in folders:
        if folder.is_symlink():
            raise RegistryError(
                f"{folder} is a symbolic link, so nothing is removed",
                expected="a folder inside the registry",
                hint=f"put the folder itself in the link's place: {folder}",
            )


def _locate(registry: Registry, reference: str) -> tuple[str, str]:
    """Name and id of what a reference points at; the manifest is not read where the id is given."""
    wanted = parse_reference(reference)
    known = registry.version_ids(wanted.name)
    if wanted.prefix is not None and known:
        check_root_format(registry.layout)
        return wanted.name, lookup.by_prefix(wanted.name, wanted.prefix, known)
    version = registry.resolve(reference)
    return version.name, version.id


def _all_versions(registry: Registry, but: Collection[tuple[str, str]] = ()) -> list[Version]:
    """Every version apart from `but`, also of names whose first publish was cut off before `latest`.

    Raises AdapterDamaged when one cannot be read: what it needs is then not known, and might be removed.
    """
    found: list[Version] = []
    damaged: dict[str, str] = {}
    for name in _all_names(registry):
        for version_id in registry.version_ids(name):
            try:
                found += [registry.load(name, version_id)] if (name, version_id) not in but else []
            except AdapterDamaged as error:
                damaged[f"{name}@{version_id}"] = error.fact
    if damaged:
        first = next(iter(damaged))
        raise AdapterDamaged(
            f"what {', '.join(damaged)} needs is not known: {damaged[first]}",
            expected="manifests that can be read, before anything else is removed",
            hint=f"restore them from a backup, or give them up with: peftkit rm {first}",
        )
    return found


def _all_names(registry: Registry) -> list[str]:
    """Every folder that may hold versions, also without the alias `latest`."""
    folders = (entry.name for entry in os.scandir(registry.root) if entry.is_dir(follow_symlinks=False))
    return sorted(filter(is_name, folders))


def _unneeded(registry: Registry) -> list[Version]:
    """Versions that no alias reaches, itself or through its children; children stand before their parents."""
    everything = {(version.name, version.id): version for version in _all_versions(registry)}
    reached: set[tuple[str, str]] = set()
    waiting = [(name, target) for name in _all_names(registry) for target in registry.aliases(name).values()]
    while waiting:
        found = waiting.pop()
        if found in everything and found not in reached:
            reached.add(found)
            waiting += [(parent.name, parent.version) for parent in everything[found].manifest.parents]
    left = {key: version for key, version in everything.items() if key not in reached}
    unneeded: list[Version] = []
    while left:  # a child's clock may have been behind its parent's, so times do not tell
        parents = {(parent.name, parent.version) for each in left.values() for parent in each.manifest.parents}
        childless = [key for key in left if key not in parents] or list(left)
        unneeded += [left.pop(key) for key in childless]
    return unneeded


def _unneeded_records(registry: Registry, removed: set[Path]) -> list[Path]:
    """Base records that no remaining version and no relation names; relations were asked for, and stay."""
    layout = registry.layout
    needed = {v.manifest.base.record for v in _all_versions(registry) if v.path not in removed}
    needed |= {end for relation in bases.relations(layout) for end in (relation.child_id, relation.parent_id)}
    return [layout.bases / f"{each}.json" for each in bases.ids(layout.bases) if each not in needed]


def _refuse_parents(registry: Registry, doomed: set[tuple[str, str]]) -> None:
    children = [
        child.reference
        for child in _all_versions(registry, but=doomed)
        if doomed & {(parent.name, parent.version) for parent in child.manifest.parents}
    ]
    if children:
        raise RegistryError(
            f"{', '.join(f'{name}@{version_id}' for name, version_id in sorted(doomed))} is needed by"
            f" {', '.join(children)}, made from it",
            expected="a version without children",
            hint=f"peftkit rm {children[0]} first, if you want that",
        )


def _move_away(name: str, alias: str, count: int) -> str:
    if alias != LATEST:
        return f"peftkit tag --remove {name} {alias}"
    if count == 1:
        return f"it is the only version: peftkit rm {name} --all"
    return f"peftkit restore {name} {LATEST}, or peftkit tag {name}@OTHER {LATEST}"


def _bytes_below(path: Path) -> int:
    files: Iterable[Path] = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())
