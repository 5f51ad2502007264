"""Push: what would leave is prepared and listed first; sending it is one commit that holds exactly that."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.errors import RegistryError
from peftkit.registry import bases
from peftkit.registry import manifest as manifests
from peftkit.registry.exchange import leaving
from peftkit.registry.exchange.export import CARD, Piece, export, pieces
from peftkit.registry.exchange.hub import PREFIX, Hub, Remote
from peftkit.registry.exchange.importing import import_adapter
from peftkit.registry.exchange.taking import ImportBase, read_small
from peftkit.registry.layout import MANIFEST, Layout
from peftkit.registry.manifest import Version
from peftkit.registry.reading import LARGEST_MANIFEST
from peftkit.registry.store import Registry


@dataclass(frozen=True)
class Parcel:
    """A version ready to leave: every file, and what of its manifest the user should have seen before."""

    version: Version
    pieces: tuple[Piece, ...]
    tells: tuple[tuple[str, str], ...]
    licensed: bool
    """Whether the user stated a licence, so that the card must say it."""


@dataclass(frozen=True)
class Arrival:
    """What sending a parcel will do to a repository."""

    remote: Remote | None
    """None: the repository will be made."""
    before: str | None
    """Reference of the version that its manifest.json holds, `another` when that cannot be read, None for none."""
    replaced: tuple[str, ...]
    removed: tuple[str, ...]
    """Files that the earlier manifest names and this one does not."""

    @property
    def nothing_to_do(self) -> bool:
        """Whether the repository holds this version already."""
        return self.remote is not None and not self.replaced and not self.removed


@dataclass(frozen=True)
class Pushed:
    """One commit; `commit` is that of the repository when nothing had to be sent."""

    commit: str
    url: str
    files: tuple[str, ...]


def prepare(registry: Registry, reference: str, license: str | None = None) -> Parcel:
    """Check a version and list what leaves with it; contacts nobody.

    Raises RegistryError when it holds a path of this machine, AdapterDamaged when it is not what was published.
    """
    version = registry.resolve(reference)
    found = pieces(registry, version, license)
    leaving.refuse_paths(found, version)
    return Parcel(version, found, tuple(leaving.telling(version)), license is not None)


def compare(parcel: Parcel, hub: Hub, *, public: bool = False) -> Arrival:
    """Look at the repository and say what sending would do; sends nothing.

    Raises RegistryError when the repository is public and `public` is not asked for.
    """
    remote = hub.look()
    if remote is None:
        return Arrival(None, None, tuple(piece.path for piece in parcel.pieces), ())
    if not remote.private and not public:
        raise RegistryError(
            f"{PREFIX}{hub.repo} exists and everybody can read it",
            expected="a private repository",
            hint="add --public, or choose another repository",
        )
    before, named = _head(hub, remote)
    sent = {piece.path for piece in parcel.pieces}
    replaced = tuple(piece.path for piece in parcel.pieces if not _is_there(piece, remote))
    removed = tuple(sorted(named & set(remote.files) - sent))
    if replaced == (CARD,) and CARD in remote.files and not parcel.licensed:
        replaced = ()  # the same version; a card that was edited by hand stays
    return Arrival(remote, before, replaced, removed)


def send(parcel: Parcel, hub: Hub, arrival: Arrival, *, public: bool = False) -> Pushed:
    """Send a parcel as one commit on top of what `compare` saw, and check that it arrived.

    Raises RegistryError when the repository changed since, or the Hub does not answer as it should: the commit was then
    made as a whole or not at all, and an empty repository may have been made.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    remote = arrival.remote
    if remote is not None and arrival.nothing_to_do:
        return Pushed(remote.commit, f"{hub.endpoint}/{hub.repo}", ())
    if remote is None:
        remote = _create(hub, public)
    wanted = [piece for piece in parcel.pieces if piece.path in arrival.replaced]
    operations: list[Any] = [CommitOperationAdd(piece.path, piece.source) for piece in wanted]
    operations += [CommitOperationDelete(path, is_folder=False) for path in arrival.removed]
    message = f"peftkit: {parcel.version.reference}"
    with hub.calls(f"pushing {parcel.version.reference} to {hub.repo}"):
        done = hub.api.create_commit(hub.repo, operations, commit_message=message, parent_commit=remote.commit)
    _check_arrived(parcel, hub, arrival, str(done.oid))
    return Pushed(str(done.oid), str(done.commit_url), tuple(piece.path for piece in wanted))


def push_to_folder(registry: Registry, reference: str, folder: Path, license: str | None = None) -> Version:
    """Export into a new folder, or import into the folder when it is a registry; returns the version.

    Raises RegistryError as `export` and `import_adapter` do.
    """
    version = registry.resolve(reference)
    if not Layout(folder).marker.is_file():
        export(registry, reference, folder, license)
        return version
    record = version.manifest.base.record
    base = ImportBase(bases.read(registry.layout, record), version.manifest.base.source) if record else None
    return import_adapter(Registry(folder), version.path, base=base)


def _head(hub: Hub, remote: Remote) -> tuple[str | None, set[str]]:
    """Which version the repository holds, and the files that its manifest names."""
    file = remote.files.get(MANIFEST)
    if file is None:
        return None, set()
    if file.size > LARGEST_MANIFEST:
        return "another", set()
    folder = Path(tempfile.mkdtemp(prefix="peftkit-push-"))
    try:
        written = read_small(hub.fetch(file, remote.commit, folder), LARGEST_MANIFEST)
        try:
            manifest = manifests.decode(written, Path(MANIFEST))
        except RegistryError:
            return "another", set()
    finally:
        durable.delete(folder)
    return f"{manifest.name}@{manifests.compute_id(written)}", set(manifest.files)


def _is_there(piece: Piece, remote: Remote) -> bool:
    file = remote.files.get(piece.path)
    if file is None:
        return False
    if file.sha256 is not None and piece.sha256 is not None:
        return (file.size, file.sha256) == (piece.size, piece.sha256)
    return file.holds(piece.source)


def _create(hub: Hub, public: bool) -> Remote:
    with hub.calls(f"making {hub.repo}"):
        hub.api.create_repo(hub.repo, private=not public)
    remote = hub.look()
    if remote is None or (not remote.private and not public):
        raise RegistryError(
            f"{hub.endpoint} did not make {hub.repo} {'as a public' if public else 'as a private'} repository",
            expected="a Hub that keeps private repositories private; nothing was sent",
            hint="make the repository on the Hub's page, then push again",
        )
    return remote


def _check_arrived(parcel: Parcel, hub: Hub, arrival: Arrival, commit: str) -> None:
    """A .gitignore in the repository makes the Hub leave files out of a commit without an error."""
    there = hub.look(commit)
    sent = [piece for piece in parcel.pieces if piece.path in arrival.replaced]
    lost = [piece.path for piece in sent if there is None or not _is_there(piece, there)]
    if lost:
        raise RegistryError(
            f"{hub.repo} holds no or other bytes for {', '.join(lost)} after the commit {commit}",
            expected="the bytes that were sent",
            hint="look for a .gitignore in the repository, then push again",
        )
