"""The manifest of a version: a closed list of fields (FORMAT.md, section 5); the version's id is that of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from peftkit.base.record import plain
from peftkit.canonical import canonical_json, digest_json, strict_json
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry.layout import FORMAT, MANIFEST, check_file, check_name
from peftkit.registry.reading import LARGEST_MANIFEST, read_plain
from peftkit.registry.receipts import Receipt

_MOST_PROBLEMS = 8

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
VersionId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Json = dict[str, JsonValue]


def timestamp(moment: datetime | None = None) -> str:
    """`moment` (or now) the way manifests spell it; the fixed width makes text order the order in time."""
    return (moment or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _utc(value: object) -> str:
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValueError(f"{value!r} is not a time with a zone, such as 2026-01-31T09:30:00Z")
    try:
        return timestamp(moment)
    except OverflowError as error:
        raise ValueError(f"{value!r} is not a time that UTC has") from error


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Part):
    """The base an adapter was trained on, by content."""

    source: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    record: VersionId | None = None
    fingerprint: Digest
    parts: dict[Literal["weights", "config", "tokenizer", "special_tokens", "chat_template"], Digest] = {}
    quantization: Json | None = None
    license: str | None = None


class File(_Part):
    """What a payload file must be."""

    sha256: Digest
    bytes: Count


class Recipe(_Part):
    """What produced the adapter; `config_sha256` is computed when left out and compared when given."""

    name: str
    sha256: Digest
    config: Json = {}
    config_sha256: Digest = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_digest(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not value.get("config_sha256"):
            return {**value, "config_sha256": digest_json(value.get("config", {}))}
        return value

    @model_validator(mode="after")
    def _compare_digest(self) -> Self:
        expected = digest_json(self.config)
        if self.config_sha256 != expected:
            raise ValueError(f"config_sha256 is {self.config_sha256}, the canonical JSON of config has {expected}")
        return self


class Data(_Part):
    """One source of rows, and what was left of it."""

    role: Literal["train", "held_out", "retention"]
    source: str
    sha256: Digest
    rows: Count
    tokens: Count | None = None
    dropped: Count = 0
    license: str | None = None


class Metrics(_Part):
    """What was measured before training, after it, and besides."""

    before: Json = {}
    after: Json = {}
    other: Json = {}


class Parent(_Part):
    """A version that this one was made from."""

    name: str
    version: VersionId
    relation: Literal["continued", "combined"]


class Draft(_Part):
    """The part of a manifest that the caller supplies; the registry adds format, name and files."""

    kind: Literal["peft", "tensors"]
    created: Annotated[str, BeforeValidator(_utc)] = Field(default_factory=timestamp)
    base: Base
    adapter: Json = {}
    recipe: Recipe | None = None
    run: str | None = None
    data: tuple[Data, ...] = ()
    environment: dict[str, str] = {}
    metrics: Metrics = Metrics()
    parents: tuple[Parent, ...] = ()
    receipts: tuple[Receipt, ...] = ()

    @model_validator(mode="after")
    def _finite(self) -> Self:
        # Free JSON may hold NaN (a metric of an empty set) or 10**400: refused here, since no reader would take it.
        strict_json(canonical_json(self.model_dump(mode="python")))
        return self


class Manifest(Draft):
    """Everything that is known about one version."""

    format: Literal["peftkit/1"]
    name: str
    files: dict[str, File]

    @model_validator(mode="after")
    def _paths(self) -> Self:
        try:
            check_name(self.name)
            for relative in self.files:
                check_file(relative)
        except RegistryError as error:
            raise ValueError(error.fact) from error
        return self


@dataclass(frozen=True)
class Version:
    """One version as found on disk."""

    name: str
    id: str
    path: Path
    manifest: Manifest

    @property
    def reference(self) -> str:
        """`name@id`: points at this version for ever."""
        return f"{self.name}@{self.id}"


def complete(draft: Draft, name: str, files: Mapping[str, File]) -> Manifest:
    """Turn a draft into a manifest."""
    fields = draft.model_dump(mode="json", include=set(Draft.model_fields))
    fields |= {"format": FORMAT, "name": name, "files": {path: file.model_dump() for path, file in files.items()}}
    return Manifest.model_validate(fields)


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: the fields a reader looks for first stand first."""
    fields = manifest.model_dump(mode="json")
    first = {key: fields.pop(key) for key in ("format", "kind", "name")}
    return json.dumps({**first, **fields}, indent=2, allow_nan=False).encode("ascii") + b"\n"


def compute_id(written: bytes) -> str:
    """The version id of a manifest's bytes."""
    return hashlib.sha256(written).hexdigest()[:16]


def check_format(found: object, where: Path) -> None:
    """Stop at a format that this code does not know (FORMAT.md, section 3)."""
    if found == FORMAT:
        return
    old = found == 1
    raise RegistryError(
        f"{where} has format {plain(repr(found))}, this peftkit reads format {FORMAT!r}",
        expected=f"format {FORMAT!r}" + ("; 1 was a development version before 0.1" if old else ""),
        hint="FORMAT.md, section 8, says how to take its adapters over" if old else "pip install --upgrade peftkit",
    )


def read(folder: Path, name: str, version_id: str) -> Manifest:
    """Read the manifest of a version and check that it is the one its id was computed from."""
    path = folder / MANIFEST
    hint = f"peftkit verify {name}"
    expected = "the manifest that was published"
    try:
        written = read_plain(path, LARGEST_MANIFEST)
    except OSError as error:
        raise AdapterDamaged(f"{path} cannot be read: {error}", expected=expected, hint=hint) from error
    if compute_id(written) != version_id:
        raise AdapterDamaged(
            f"{path} was changed: its bytes give the id {compute_id(written)}",
            expected=f"{version_id}, the name of its folder",
            hint=hint,
        )
    manifest = decode(written, path)
    if manifest.name != name:
        raise AdapterDamaged(f"{path} belongs to the adapter {manifest.name!r}", expected=repr(name), hint=hint)
    return manifest


def decode(written: bytes, path: Path) -> Manifest:
    """The manifest that `written` spells; AdapterDamaged says what does not follow FORMAT.md, `path` where."""
    expected = "a manifest as FORMAT.md, section 5, defines it"
    try:
        raw = strict_json(written)
    except ValueError as error:
        raise AdapterDamaged(f"{path} cannot be read: {error}", expected=expected) from error
    if not isinstance(raw, dict):
        raise AdapterDamaged(f"{path} is not a JSON object", expected=expected)
    check_format(raw.get("format"), path)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        listed = [plain(f"{'.'.join(map(str, item['loc']))}: {item['msg']}", 200) for item in error.errors()]
        more = f"; and {len(listed) - _MOST_PROBLEMS} more" if len(listed) > _MOST_PROBLEMS else ""
        problems = "; ".join(listed[:_MOST_PROBLEMS]) + more
        raise AdapterDamaged(f"{path} does not follow FORMAT.md: {problems}", expected=expected) from error
    read = manifest.model_dump(mode="json")
    if differ := sorted(field for field in read if field not in raw or read[field] != raw[field]):
        # Another reader would not know the value that stands for what was left out or spelt in another way.
        raise AdapterDamaged(
            f"{path} does not follow FORMAT.md: {', '.join(differ)}: a field is missing or spelt in another way",
            expected=expected,
        )
    return manifest
