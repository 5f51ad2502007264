"""Pull: the files of one adapter, checked before, while and after the download, then imported like any folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peftkit.base.record import plain
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry import manifest as manifests
from peftkit.registry.exchange import foreign
from peftkit.registry.exchange.hub import PREFIX, Hub, Remote, RemoteFile, missing
from peftkit.registry.exchange.importing import FindBase, import_adapter
from peftkit.registry.exchange.taking import ImportBase, read_small
from peftkit.registry.intake.quarantine import CONFIG, TENSORS, WEIGHTS
from peftkit.registry.intake.rules import LARGEST_CONFIG, LARGEST_FILE
from peftkit.registry.layout import BASE_RECORD, MANIFEST
from peftkit.registry.manifest import Manifest, Version
from peftkit.registry.reading import LARGEST_MANIFEST, LARGEST_RECORD
from peftkit.registry.store import Registry

_LIMITS = {
    MANIFEST: LARGEST_MANIFEST,
    BASE_RECORD: LARGEST_RECORD,
    CONFIG: LARGEST_CONFIG,
    WEIGHTS: LARGEST_FILE,
    TENSORS: LARGEST_FILE,
}
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


def pull(
    registry: Registry,
    hub: Hub,
    *,
    revision: str | None = None,
    name: str | None = None,
    base: ImportBase | None = None,
    find_base: FindBase | None = None,
    aliases: Sequence[str] = (),
) -> Version:
    """Download an adapter of a repository and import it; only files of an adapter are asked for, never a pickle.

    Raises RegistryError for what is missing, too large or refused by a rule, AdapterDamaged for bytes that differ from
    what the repository lists; the registry is then as before.
    """
    remote = hub.look(revision)
    if remote is None:
        raise missing(hub)
    folder = Path(tempfile.mkdtemp(prefix="peftkit-pull-"))
    try:
        for file in _wanted(hub, remote, folder):
            hub.fetch(file, remote.commit, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # where the Hub's client notes what it downloaded
        origin = f"{PREFIX}{hub.repo}@{remote.commit}"
        if name is None and not (folder / MANIFEST).exists():
            name = foreign.legal_name(hub.repo)
        return import_adapter(
            registry, folder, name=name, base=base, find_base=find_base, aliases=aliases, origin=origin
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wanted(hub: Hub, remote: Remote, folder: Path) -> list[RemoteFile]:
    """The files to download, none of them over its limit; the manifest, which names them, is downloaded first."""
    if MANIFEST not in remote.files:
        return [_within(remote, hub, name) for name in _foreign_names(hub, remote)]
    path = hub.fetch(_within(remote, hub, MANIFEST), remote.commit, folder)
    manifest = manifests.decode(read_small(path, LARGEST_MANIFEST), Path(f"{PREFIX}{hub.repo}/{MANIFEST}"))
    unknown = sorted(set(manifest.files) - set(_LIMITS))
    if unknown:
        raise RegistryError(
            f"the manifest of {PREFIX}{hub.repo} names {', '.join(unknown[:5])}",
            expected=f"{CONFIG} and {WEIGHTS}, or {TENSORS}, and nothing else",
            hint="an adapter from outside brings no other files in",
        )
    needed = [*sorted(manifest.files), *([BASE_RECORD] if manifest.base.record else [])]
    files = [_within(remote, hub, name) for name in needed]
    _check_listed(hub, manifest, files)
    return files


def _foreign_names(hub: Hub, remote: Remote) -> list[str]:
    if {CONFIG, WEIGHTS} <= set(remote.files):
        return [CONFIG, WEIGHTS]
    pickles = [name for name in _PICKLES if name in remote.files]
    held = ", ".join(plain(name, 60) for name in sorted(remote.files)[:8]) or "nothing"
    raise RegistryError(
        f"{PREFIX}{hub.repo} holds no adapter that can be taken"
        + (f": its weights are a pickle, {pickles[0]}, which is not downloaded" if pickles else f"; it holds {held}"),
        expected=f"{CONFIG} and {WEIGHTS} at the top of the repository",
        hint="ask its author for safetensors" if pickles else "give the repository of an adapter, not of a base",
    )


def _within(remote: Remote, hub: Hub, name: str) -> RemoteFile:
    file = remote.files.get(name)
    if file is None:
        raise AdapterDamaged(
            f"{PREFIX}{hub.repo} lacks {name}", expected="every file that its manifest names", hint="push it again"
        )
    if file.size > _LIMITS[name]:
        raise RegistryError(
            f"{name} of {PREFIX}{hub.repo} has {file.size} bytes",
            expected=f"at most {_LIMITS[name]} bytes; nothing of it was downloaded",
            hint="it is no adapter that peftkit takes",
        )
    return file


def _check_listed(hub: Hub, manifest: Manifest, files: Sequence[RemoteFile]) -> None:
    for file in files:
        promised = manifest.files.get(file.path)
        if promised is not None and (file.size, file.sha256 or promised.sha256) != (promised.bytes, promised.sha256):
            raise AdapterDamaged(
                f"{file.path} of {PREFIX}{hub.repo} is not the file that its manifest names: {file.size} bytes",
                expected=f"{promised.bytes} bytes with the digest {promised.sha256}",
                hint="push the version again",
            )
