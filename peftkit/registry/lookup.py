"""Finding what a reference points at, and saying what there is when it points at nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from peftkit.errors import AdapterNotFound, RegistryError


def by_prefix(name: str, prefix: str, known: Sequence[str]) -> str:
    """The one version id of `known` that starts with `prefix`."""
    matches = [version_id for version_id in known if version_id.startswith(prefix)]
    if len(matches) > 1:
        raise RegistryError(
            f"{name}@{prefix} matches {len(matches)} versions: {', '.join(matches)}",
            expected="a prefix that only one version starts with",
            hint=f"peftkit show {name}@{matches[0]}",
        )
    if not matches:
        raise AdapterNotFound(
            f"no version of {name!r} starts with {prefix}",
            expected=f"one of {', '.join(known)}",
            hint=f"peftkit show {name}",
        )
    return matches[0]


def unknown_name(name: str, root: Path, names: Sequence[str]) -> AdapterNotFound:
    """The error for a name that is not in the registry."""
    return AdapterNotFound(
        f"no adapter is called {name!r} in {root}{_near(name, names)}",
        expected=f"one of {', '.join(names)}" if names else "an adapter; this registry is empty",
        hint="peftkit list",
    )


def removed(name: str, version_id: str, known: Sequence[str]) -> AdapterNotFound:
    """The error for a version that is not there, or not any more."""
    return AdapterNotFound(
        f"{name}@{version_id} is not there",
        expected=f"one of {', '.join(known)}" if known else "a version; this adapter has none",
        hint=f"peftkit show {name}" if known else "peftkit list",
    )


def unknown_alias(name: str, alias: str, known: Sequence[str], found: Mapping[str, str]) -> AdapterNotFound:
    """The error for an alias that a name does not have."""
    return AdapterNotFound(
        f"{name!r} has no alias {alias!r}{_near(alias, found, f'{name}@')}",
        expected=f"an alias ({', '.join(found) or 'there is none'}) or a version ({', '.join(known)})",
        hint=f"peftkit tag {name}@{known[0]} {alias}",
    )


def _near(word: str, known: Iterable[str], before: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(before + found for found in near)}?" if near else ""
