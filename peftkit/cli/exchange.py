"""`peftkit import`, `push`, `pull`: adapters that enter and leave the registry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit import locations, render
from peftkit.base.record import plain
from peftkit.base.ref import BaseSpec
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Reference, RegistryRoot, open_registry
from peftkit.errors import RegistryError, TuningError
from peftkit.registry.layout import LATEST
from peftkit.registry.store import Registry, Version

if TYPE_CHECKING:
    from peftkit.registry.exchange import Arrival, Hub, ImportBase, Parcel, Piece

As = Annotated[str | None, typer.Option("--as", metavar="NAME", help="Another name; the version gets another id.")]
BaseOf = Annotated[str | None, typer.Option("--base", metavar="REF", help="The base that it was trained on.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="ALIAS", help="Point this alias at it too.")]
License = Annotated[str | None, typer.Option("--license", help="The adapter's licence, such as apache-2.0.")]


def import_adapter_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder: exported by peftkit, or saved by PEFT.")],
    name: As = None,
    base: BaseOf = None,
    tags: Tags = None,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Take an adapter from a folder into the registry, after checking every byte of it.

    Example: peftkit import ./tickets --as tickets
    """
    from peftkit.registry.exchange import import_adapter

    store = open_registry(registry)
    before = _latest(store)
    version = import_adapter(
        store, path.expanduser(), name=name, base=_base(base, as_json), find_base=_find_base, aliases=tags or []
    )
    _show_taken(version, before, as_json)


def push(
    name: Reference,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="hub:owner/name, a folder, or a registry.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read the repository.")] = False,
    license: License = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would leave; contact nobody.")] = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Send an adapter to a model repository of the Hub (private), or to a folder; lists what leaves and asks first.

    Example: peftkit push tickets hub:me/tickets
    """
    from peftkit.registry.exchange import Hub, parse, prepare, push_to_folder

    store = open_registry(registry)
    repo = parse(destination)
    parcel = prepare(store, name, license)
    if not as_json:
        show(None, as_json=False, text=_describe(parcel, destination, public=public or repo is None))
    if dry_run:
        show(_parcel_value(parcel, destination), as_json=as_json, text="nothing was sent (--dry-run)")
    elif repo is not None:
        _send(parcel, Hub(repo), destination, public=public, yes=yes, as_json=as_json)
    else:
        sent = push_to_folder(store, parcel.version.reference, Path(destination).expanduser(), license)
        value = {"version": sent.reference, "to": destination}
        show(value, as_json=as_json, text=f"{sent.reference} is in {destination}")


def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="hub:owner/name, or a folder.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the repository.")] = None,
    name: As = None,
    base: BaseOf = None,
    tags: Tags = None,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an adapter from a model repository of the Hub, or a folder, and import it.

    Example: peftkit pull hub:me/tickets
    """
    from peftkit.registry.exchange import Hub, import_adapter, parse
    from peftkit.registry.exchange import pull as pull_from

    store = open_registry(registry)
    repo = parse(source)
    if repo is None and revision is not None:
        raise RegistryError(
            f"{source} is a folder", expected="--revision only with hub:owner/name", hint="leave it out"
        )
    before = _latest(store)
    options: dict[str, Any] = {"name": name, "base": _base(base, as_json), "find_base": _find_base}
    options["aliases"] = tags or []
    if repo is None:
        version = import_adapter(store, Path(source).expanduser(), **options)
    else:
        version = pull_from(store, Hub(repo), revision=revision, **options)
    _show_taken(version, before, as_json)


def _latest(store: Registry) -> dict[str, str]:
    """Where `latest` of every adapter points, to say afterwards that it moved."""
    return {name: target for name in store.names() if (target := store.aliases(name).get(LATEST))}


def _base(reference: str | None, as_json: bool) -> ImportBase | None:
    """The base that the user names, downloaded if it must be."""
    if reference is None:
        return None
    from peftkit.backbone.locate import license_of, locate
    from peftkit.base.identity import identify
    from peftkit.base.places import remember_place
    from peftkit.registry.exchange import ImportBase

    cache = locations.cache_root().path
    with Reporter(as_json=as_json, warnings_only=True) as report:
        base = locate(BaseSpec(source=reference), cache, report)
    identity = identify(base.folder, cache)
    remember_place(identity, base.place, cache)
    return ImportBase(identity.record, base.portable, base.revision, license_of(base))


def _find_base(stated: str) -> ImportBase | None:
    """The base that an adapter's own config names, only where this machine has it: a stranger starts no download."""
    from huggingface_hub import try_to_load_from_cache

    from peftkit.base import embedded
    from peftkit.base.identity import identify, license_of
    from peftkit.registry.exchange import ImportBase
    from peftkit.registry.exchange.card import is_hub_id

    cache = locations.cache_root().path
    if stated.startswith("embedded:"):
        name = stated.removeprefix("embedded:")
        known = name in embedded.EMBEDDED and embedded.place_of(name, cache).exists()
        return _base(stated, as_json=True) if known else None
    found = try_to_load_from_cache(stated, "config.json") if is_hub_id(stated) else None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return ImportBase(identify(folder, cache).record, stated, folder.name, license_of(folder))


def _show_taken(version: Version, before: dict[str, str], as_json: bool) -> None:
    manifest = version.manifest
    imported = next((each for each in reversed(manifest.receipts) if each["type"] == "import"), None)
    lines = [f"{version.reference} is in the registry, for the base {plain(manifest.base.source)}"]
    earlier = before.get(version.name)
    if earlier is not None and earlier != version.id:
        lines.append(f"{version.name}@{LATEST} was {earlier}; peftkit restore {version.name} {LATEST} brings it back")
    for word in ("notes", "left_out"):
        said = imported.get(word) if imported else None
        lines += (
            [f"  {word.replace('_', ' ')}: {plain(str(text), 300)}" for text in said] if isinstance(said, list) else []
        )
    if refusal := _not_attachable(version):
        lines.append(f"  it is kept, but cannot be attached: {refusal}")
    value = {"version": version.reference, "latest_before": earlier, "receipt": imported, "not_attachable": refusal}
    show(value, as_json=as_json, text="\n".join(lines))


def _not_attachable(version: Version) -> str | None:
    """Why peftkit would not attach an adapter over any base, None when nothing speaks against it."""
    from peftkit.tuning.attachable import check_config

    if version.manifest.kind != "peft":
        return None
    try:
        check_config(json.loads((version.path / "adapter_config.json").read_bytes()), version.reference, 16)
    except TuningError as error:
        return error.fact
    return None


def _send(parcel: Parcel, hub: Hub, destination: str, *, public: bool, yes: bool, as_json: bool) -> None:
    from peftkit.registry.exchange import compare, send

    if not yes and (as_json or not _can_ask()):
        raise RegistryError(
            f"nothing was sent to {destination}: there is no terminal to ask on",
            expected="your consent",
            hint="look at it with --dry-run, then add --yes",
        )
    arrival = compare(parcel, hub, public=public)
    if not as_json:
        show(None, as_json=False, text=_outcome(arrival, destination))
    if not arrival.nothing_to_do and not yes:
        typer.confirm(f"Send this to {destination}?", abort=True)
    pushed = send(parcel, hub, arrival, public=public)
    value: dict[str, Any] = {"version": parcel.version.reference, "to": destination}
    value |= {"commit": pushed.commit, "url": pushed.url}
    value |= {"files": list(pushed.files), "on_top_of": arrival.before}
    text = f"{parcel.version.reference} is at {pushed.url}" if pushed.files else "nothing was sent"
    show(value, as_json=as_json, text=text)


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _describe(parcel: Parcel, destination: str, *, public: bool) -> str:
    """What leaves, where to, and what it tells."""
    who = "everybody who can read it" if public else "you and those you let in (private)"
    lines = [f"{parcel.version.reference} to {destination}, for {who}; what leaves:", listing(parcel.pieces)]
    lines += ["", "no rows of data and no samples are among it; its manifest names:"]
    return "\n".join([*lines, render.facts([(f"  {where}", text) for where, text in parcel.tells])])


def _outcome(arrival: Arrival, destination: str) -> str:
    if arrival.remote is None:
        return f"{destination} does not exist yet and will be made"
    if arrival.nothing_to_do:
        return f"{destination} holds this version already: nothing to do"
    before = f"holds {arrival.before}" if arrival.before else "holds no adapter of peftkit"
    there = [path for path in arrival.replaced if path in arrival.remote.files]
    lines = [f"{destination} {before}; this will be a new commit on top, the old one stays in its history"]
    lines += [f"  other bytes for {', '.join(there)}"] if there else []
    lines += [f"  removed: {', '.join(arrival.removed)}"] if arrival.removed else []
    return "\n".join(lines)


def listing(pieces: tuple[Piece, ...]) -> str:
    """Path, size and meaning of every file, a line each."""
    return render.facts([(f"  {piece.path}", f"{render.size(piece.size)}, {piece.holds}") for piece in pieces])


def files_of(pieces: tuple[Piece, ...]) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [{"path": piece.path, "bytes": piece.size, "holds": piece.holds} for piece in pieces]


def _parcel_value(parcel: Parcel, destination: str) -> dict[str, Any]:
    tells = [{"field": where, "text": text} for where, text in parcel.tells]
    return {"version": parcel.version.reference, "to": destination, "files": files_of(parcel.pieces), "tells": tells}
