"""`peftkit tag`, `restore`, `rm`, `gc`, `verify`: moving aliases, removing versions, checking what is there."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit import render
from peftkit.cli.console import show
from peftkit.cli.options import AsJson, Reference, RegistryRoot, open_registry
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry.collect import collect, remove, remove_adapter
from peftkit.registry.layout import LATEST, check_name
from peftkit.registry.verify import check_adapter, check_root, check_version

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name, without @.")]


def tag(
    name: Reference,
    alias: Annotated[str, typer.Argument(help="Such as prod.")],
    remove_it: Annotated[bool, typer.Option("--remove", help="Remove the alias; its history stays.")] = False,
    registry: RegistryRoot = None,
) -> None:
    """Point an alias at a version, or remove the alias.

    Example: peftkit tag tickets@3f9a prod
    """
    store = open_registry(registry)
    if remove_it:
        store.untag(name, alias)
        show(None, as_json=False, text=f"{name}@{alias} is removed; peftkit restore {name} {alias} brings it back")
        return
    version = store.tag(name, alias)
    show(None, as_json=False, text=f"{version.name}@{alias} is now {version.reference}")


def restore(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias to roll back.")] = LATEST,
    to: Annotated[int | None, typer.Option("--to", help="Number of the move, as peftkit log shows it.", min=1)] = None,
    registry: RegistryRoot = None,
) -> None:
    """Roll an alias back to where it pointed before; no history is lost.

    Example: peftkit restore tickets prod
    """
    version = open_registry(registry).restore(name, alias, to=to)
    show(None, as_json=False, text=f"{name}@{alias} is again {version.reference}")


def rm(
    name: Reference,
    everything: Annotated[bool, typer.Option("--all", help="Remove the adapter with all its versions.")] = False,
    registry: RegistryRoot = None,
) -> None:
    """Remove a version that no alias and no other version needs.

    Example: peftkit rm tickets@3f9a
    """
    store = open_registry(registry)
    if everything:
        removed = remove_adapter(store, name)
        show(None, as_json=False, text=f"removed {name} with {_versions(len(removed))}: {', '.join(removed)}")
        return
    show(None, as_json=False, text=f"removed {remove(store, name)}")


def gc(
    versions: Annotated[
        bool, typer.Option("--versions", help="Also versions that no alias points at and nothing was made from.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list.")] = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Delete what interrupted writers left, and base records that no version needs.

    Example: peftkit gc --versions --dry-run
    """
    found = collect(open_registry(registry), versions=versions, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    text = "\n".join([f"{verb} {len(found.paths)} entries, {render.size(found.bytes)}", *found.paths])
    show({"removed": list(found.paths), "bytes": found.bytes, "dry_run": dry_run}, as_json=as_json, text=text)


def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="name, name@version or name@alias; all without it.")
    ] = None,
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Also read every byte and compare its digest.")
    ] = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter, or the whole registry, against its manifests.

    Without --read-data: presence, sizes, headers and all records, but not the tensors.

    Example: peftkit verify tickets --read-data
    """
    store = open_registry(registry)
    if name is None:
        if not store.root.is_dir():
            raise RegistryError(
                f"there is no registry in {store.root}", expected="a folder", hint="name it: --registry"
            )
        problems = check_root(store.root, read_data=read_data)
        whole = f"{store.root}: {_versions(sum(len(store.version_ids(each)) for each in store.names()))}, all whole"
    elif "@" not in name and store.version_ids(check_name(name)):
        problems = check_adapter(store.root, name, read_data=read_data)
        whole = f"{name}: {_versions(len(store.version_ids(name)))}, all whole"
    else:
        version = store.resolve(name)
        problems = {version.reference: found} if (found := check_version(version, read_data=read_data)) else {}
        whole = f"{version.reference} is whole: {len(version.manifest.files)} files"
    show({"problems": problems, "read_data": read_data}, as_json=as_json, text="" if problems else whole)
    if problems:
        lines = [f"- {where}: {sentence}" for where, found in problems.items() for sentence in found]
        raise AdapterDamaged(
            f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in {store.root}\n" + "\n".join(lines),
            hint="restore the named files from a backup, or remove the version and publish or pull it again",
        )


def _versions(count: int) -> str:
    return f"{count} version{'' if count == 1 else 's'}"
