"""Taking in a folder that peftkit exported: the same bytes, so the same version id, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.base.record import BaseRecord, explain, plain
from peftkit.base.record import decode as decode_record
from peftkit.canonical import canonical_json, strict_json
from peftkit.errors import AdapterDamaged, BaseError, BaseMismatch, RegistryError
from peftkit.registry import manifest as manifests
from peftkit.registry import receipts
from peftkit.registry.bases import describes
from peftkit.registry.exchange.taking import ImportBase, Taken, read_small
from peftkit.registry.intake import Intake, inspect
from peftkit.registry.intake.quarantine import CONFIG
from peftkit.registry.intake.rules import LARGEST_CONFIG
from peftkit.registry.layout import BASE_RECORD, MANIFEST, REQUIRED_FILES
from peftkit.registry.manifest import Draft, Manifest
from peftkit.registry.reading import LARGEST_MANIFEST, LARGEST_RECORD

_AGAIN = "get the folder again from where it was exported"
_ABSENT = object()


def take(
    source: Path,
    quarantine: Path,
    name: str | None,
    base: ImportBase | None,
    known: Callable[[str], BaseRecord | None],
) -> Taken:
    """Copy an exported version into the new folder `quarantine`, checked; another `name` makes a new manifest.

    `known` gives a base record of the registry. Raises AdapterDamaged for bytes that differ from the manifest,
    AdapterRefused for what the rules of intake forbid, BaseMismatch when `base` is not the recorded one.
    """
    written = read_small(source / MANIFEST, LARGEST_MANIFEST)
    manifest = manifests.decode(written, source / MANIFEST)
    _check_files(source, manifest)
    record = _record(source, manifest, base, known)
    dtypes = {tensor: entry.dtype for tensor, entry in record.tensors.items()}
    intake = inspect(source, quarantine, record.shapes(), dtypes)
    _check_digests(source, manifest, intake)
    if intake.config is not None:
        _keep_config(source, quarantine, manifest, intake.config)
    if name is None or name == manifest.name:
        return Taken(manifest, written, record)
    return _renamed(manifest, name, manifests.compute_id(written), record)


def _check_files(source: Path, manifest: Manifest) -> None:
    needed = set(REQUIRED_FILES[manifest.kind])
    if needed != set(manifest.files):
        raise RegistryError(
            f"the manifest in {source} names {', '.join(sorted(manifest.files)) or 'no files'}",
            expected=f"exactly {' and '.join(sorted(needed))}: an adapter from outside brings nothing else in",
            hint="import it as a plain PEFT checkpoint: move its manifest.json away and add --base REF",
        )


def _record(
    source: Path, manifest: Manifest, base: ImportBase | None, known: Callable[[str], BaseRecord | None]
) -> BaseRecord:
    wanted = manifest.base.record
    if wanted is None:
        raise RegistryError(
            f"the manifest in {source} names no base record, so nothing says which base it fits",
            expected="an adapter that was exported with the record of its base",
            hint="import it as a plain PEFT checkpoint: move its manifest.json away and add --base REF",
        )
    if base is not None and base.record.id != wanted:
        recorded = _stored_record(source, wanted) or known(wanted)
        differs = explain(recorded, base.record)[:3] if recorded else [f"its record is {base.record.id}"]
        raise BaseMismatch(
            f"the adapter in {source} was trained on {plain(manifest.base.source)}, not on {plain(base.source)}: "
            + "; ".join(differs),
            expected=f"the base with the record {wanted}",
            hint="leave --base out: an exported adapter brings the record of its base along",
        )
    record = _stored_record(source, wanted) or (base.record if base else None) or known(wanted)
    if record is None:
        raise AdapterDamaged(
            f"{source} lacks {BASE_RECORD}", expected=f"the base record {wanted}, which its manifest names", hint=_AGAIN
        )
    if not describes(record, manifest.base):
        raise AdapterDamaged(
            f"the base record {wanted} and the manifest in {source} describe different bases",
            expected="the parts and the fingerprint that the record gives",
            hint=_AGAIN,
        )
    return record


def _stored_record(source: Path, wanted: str) -> BaseRecord | None:
    path = source / BASE_RECORD
    if not path.exists() and not path.is_symlink():
        return None
    try:
        record = decode_record(read_small(path, LARGEST_RECORD))
    except BaseError as error:
        raise AdapterDamaged(f"{path}: {error.fact}", expected="a base record", hint=_AGAIN) from error
    if record.id != wanted:
        raise AdapterDamaged(f"{path} is the base record {record.id}", expected=wanted, hint=_AGAIN)
    return record


def _check_digests(source: Path, manifest: Manifest, intake: Intake) -> None:
    if intake.kind != manifest.kind:
        raise AdapterDamaged(f"{source} holds kind {intake.kind!r}", expected=f"{manifest.kind!r}", hint=_AGAIN)
    for path, promised in sorted(manifest.files.items()):
        digest, size = intake.sources[path]
        if (digest, size) != (promised.sha256, promised.bytes):
            raise AdapterDamaged(
                f"{source / path} was changed: {size} bytes with the digest {digest}",
                expected=f"{promised.bytes} bytes with the digest {promised.sha256}",
                hint=_AGAIN,
            )


def _keep_config(source: Path, quarantine: Path, manifest: Manifest, checked: dict[str, Any]) -> None:
    """Put the config back as it was spelled, since the id covers its bytes; RegistryError if intake changed it."""
    given = read_small(source / CONFIG, LARGEST_CONFIG)
    promised = manifest.files[CONFIG].sha256
    if hashlib.sha256(given).hexdigest() != promised:
        raise AdapterDamaged(f"{source / CONFIG} changed while it was imported", expected=promised, hint=_AGAIN)
    if changed := _changes(strict_json(given), checked, manifest.base.source):
        raise RegistryError(
            f"{CONFIG} in {source} has settings that an adapter from outside may not keep: {', '.join(changed)}",
            expected="settings that can be loaded as they are: a version id covers every byte",
            hint="move manifest.json away and import it as a plain PEFT checkpoint with --base REF, which resets them",
        )
    (quarantine / CONFIG).unlink()
    durable.write_file(quarantine / CONFIG, given)


def _changes(given: dict[str, Any], checked: dict[str, Any], base: str) -> list[str]:
    """Keys that intake gave another meaning; those it drops because they were empty are none."""
    return [
        key
        for key in sorted(given.keys() | checked.keys())
        if not _same(given.get(key, _ABSENT), checked.get(key, _ABSENT))
        and not (key == "base_model_name_or_path" and _names_base(given.get(key), base))
    ]


def _same(before: Any, after: Any) -> bool:
    if before is _ABSENT or after is _ABSENT:
        return before is after or before in (None, {}, [], False, "RANDOM")
    return canonical_json(before) == canonical_json(after)


def _names_base(stated: Any, base: str) -> bool:
    """Whether the config names the manifest's base by a name and no path, as `embedded:…` and folders are named."""
    return stated == base and not set(base) & {"/", "\\", "\0"} and base not in (".", "..")


def _renamed(manifest: Manifest, name: str, version_id: str, record: BaseRecord) -> Taken:
    files = {path: file.sha256 for path, file in manifest.files.items()}
    receipt = receipts.imported(f"{manifest.name}@{version_id}", files, [], [], "manifest")
    fields = manifest.model_dump(mode="json", include=set(Draft.model_fields))
    draft = Draft.model_validate({**fields, "receipts": [*fields["receipts"], receipt]})
    complete = manifests.complete(draft, name, manifest.files)
    return Taken(complete, manifests.encode(complete), record)
