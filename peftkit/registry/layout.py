"""Names and paths of the registry: every path is built here, from parts that were checked here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from peftkit.base.record import FORMAT as FORMAT
from peftkit.errors import RegistryError

LATEST = "latest"
MANIFEST = "manifest.json"
BASE_RECORD = "base.json"
"""The base record in an exported folder (FORMAT.md, section 7)."""
PAYLOAD_SUFFIXES = (".safetensors", ".json")
REQUIRED_FILES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "tensors": ("tensors.safetensors",),
}

# No dot in a name: PEFT turns the adapter's name into a torch module name, and those cannot hold one.
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
_ALIAS = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_ID = re.compile(r"[0-9a-f]{16}")
_PREFIX = re.compile(r"[0-9a-f]{4,16}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RECORD = re.compile(r"[0-9]{8}")
_DEEPEST = 4

_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))})
# Words that mean something else where adapters are named: the base, PEFT's own adapter, folders of the registry.
_RESERVED = frozenset({"base", "base_model", "bases", "default", "lora", LATEST, "relations", "tmp"})

_NAME_RULE = "1 to 64 of a-z, 0-9, _ and -, first and last a letter or digit"
_ALIAS_RULE = "1 to 64 of a-z, 0-9, '.', _ and -, first and last a letter or digit"
_FILE_RULE = f"{' or '.join(PAYLOAD_SUFFIXES)}, path parts of A-Z, a-z, 0-9, '.', _ and -, at most {_DEEPEST} deep"


def check_name(name: str) -> str:
    """Return `name` if an adapter may be called so, else raise RegistryError."""
    if not _NAME.fullmatch(name):
        if "@" in name:
            raise RegistryError(
                f"{name!r} names a version or an alias",
                expected="the adapter's name alone",
                hint=f"use {name.partition('@')[0]!r}",
            )
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:64].strip("-")
        hint = f"use the name {near!r}" if is_name(near) else "choose another name, for example 'tickets'"
        raise RegistryError(f"the adapter name {name!r} cannot be used", expected=_NAME_RULE, hint=hint)
    if name in _RESERVED or name in _DEVICES:
        raise RegistryError(
            f"the adapter name {name!r} is reserved",
            expected=f"any name but {', '.join(sorted(_RESERVED))} and the Windows device names",
            hint=f"use the name 'my-{name}'",
        )
    return name


def is_name(name: str) -> bool:
    """Whether an adapter may be called `name`."""
    return bool(_NAME.fullmatch(name)) and name not in _RESERVED and name not in _DEVICES


def check_alias(alias: str) -> str:
    """Return `alias` if a version may be called so, else raise RegistryError."""
    if not _ALIAS.fullmatch(alias) or alias.split(".")[0] in _DEVICES:
        raise RegistryError(
            f"the alias {alias!r} cannot be used",
            expected=f"{_ALIAS_RULE}; no Windows device name",
            hint="peftkit tag NAME@VERSION prod",
        )
    if _PREFIX.fullmatch(alias):
        raise RegistryError(
            f"the alias {alias!r} reads like a version id",
            expected="an alias that is not made of 4 to 16 hex digits only",
            hint=f"peftkit tag NAME@VERSION v-{alias}",
        )
    return alias


def is_alias(alias: str) -> bool:
    """Whether a version may be called `alias`."""
    return bool(_ALIAS.fullmatch(alias)) and alias.split(".")[0] not in _DEVICES and not _PREFIX.fullmatch(alias)


def is_version_id(text: str) -> bool:
    """Whether `text` is a full version id."""
    return bool(_ID.fullmatch(text))


def is_record_name(text: str) -> bool:
    """Whether `text` is the file name of an alias record."""
    return bool(_RECORD.fullmatch(text)) and int(text) > 0


def check_file(relative: str) -> str:
    """Return `relative` if a payload file may be called so, else raise RegistryError.

    Called on publish and again on every manifest that is read, so no manifest can name a path outside its version.
    """
    parts = relative.split("/")
    sound = len(parts) <= _DEEPEST and all(_SEGMENT.fullmatch(part) and not part.endswith(".") for part in parts)
    if not sound or not relative.endswith(PAYLOAD_SUFFIXES):
        raise RegistryError(
            f"the file {relative!r} cannot be part of an adapter",
            expected=_FILE_RULE,
            hint="leave the file out, or save its tensors as safetensors",
        )
    if relative.lower() in (MANIFEST, BASE_RECORD):
        raise RegistryError(
            f"the file {relative!r} cannot be part of an adapter: peftkit writes it itself",
            expected=f"a folder without {MANIFEST} and {BASE_RECORD}",
            hint=f"leave {relative} out of the folder, or peftkit import it",
        )
    return relative


@dataclass(frozen=True)
class Reference:
    """What the user wrote to point at a version: a name and an alias, or a name and the start of a version id."""

    name: str
    alias: str | None
    prefix: str | None


def parse_reference(text: str) -> Reference:
    """Split `name`, `name@alias` or `name@version`; RegistryError if a part cannot be one."""
    name, at, selector = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name, LATEST, None)
    if _PREFIX.fullmatch(selector):
        return Reference(name, None, selector)
    if not is_alias(selector):
        raise RegistryError(
            f"{selector!r} in {text!r} is neither an alias nor a version",
            expected=f"name, name@alias (an alias is {_ALIAS_RULE}), or name@ and 4 to 16 hex digits of a version id",
            hint=f"peftkit show {name}",
        )
    return Reference(name, selector, None)


@dataclass(frozen=True)
class Layout:
    """The paths of one registry."""

    root: Path

    @property
    def marker(self) -> Path:
        """`registry.json`, which says that this folder is a registry, and of which format."""
        return self.root / "registry.json"

    @property
    def lock(self) -> Path:
        """The file that writers lock."""
        return self.root / ".lock"

    @property
    def tmp(self) -> Path:
        """Where things are built; on the same file system as the rest, so that a rename is atomic."""
        return self.root / "tmp"

    def adapter(self, name: str) -> Path:
        """The folder of one name."""
        return self.root / check_name(name)

    def versions(self, name: str) -> Path:
        """The folder of all versions of one name."""
        return self.adapter(name) / "versions"

    def version(self, name: str, version_id: str) -> Path:
        """The folder of one version."""
        if not is_version_id(version_id):
            raise RegistryError(
                f"{version_id!r} is no version id", expected="16 hex digits", hint=f"peftkit show {name}"
            )
        return self.versions(name) / version_id

    def aliases(self, name: str) -> Path:
        """The folder of all aliases of one name."""
        return self.adapter(name) / "aliases"

    def alias(self, name: str, alias: str) -> Path:
        """The folder of the records of one alias."""
        return self.aliases(name) / check_alias(alias)

    def record(self, name: str, alias: str, number: int) -> Path:
        """The file of one record of an alias."""
        return self.alias(name, alias) / f"{number:08d}"

    @property
    def bases(self) -> Path:
        """The folder of the base records."""
        return self.root / "bases"

    @property
    def relations(self) -> Path:
        """The folder of what was measured between bases."""
        return self.root / "relations"

    @property
    def index(self) -> Path:
        """The cache of what `list` shows."""
        return self.root / "index.sqlite"
