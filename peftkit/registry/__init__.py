"""The store of adapters on disk, with versions and aliases (FORMAT.md beside this file is its definition)."""

from peftkit.canonical import canonical_json, digest_json
from peftkit.registry.collect import Collected, collect, remove, remove_adapter
from peftkit.registry.layout import is_alias, is_name, parse_reference
from peftkit.registry.manifest import (
    Base,
    Data,
    Draft,
    File,
    Manifest,
    Metrics,
    Parent,
    Recipe,
    Version,
    timestamp,
)
from peftkit.registry.store import Move, Registry
from peftkit.registry.verify import check, check_root

__all__ = [
    "Base",
    "Collected",
    "Data",
    "Draft",
    "File",
    "Manifest",
    "Metrics",
    "Move",
    "Parent",
    "Recipe",
    "Registry",
    "Version",
    "canonical_json",
    "check",
    "check_root",
    "collect",
    "digest_json",
    "is_alias",
    "is_name",
    "parse_reference",
    "remove",
    "remove_adapter",
    "timestamp",
]
