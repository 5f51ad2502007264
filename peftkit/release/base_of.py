"""The base that a version was trained on: found on this machine or named, and compared with the manifest by content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.backbone.locate import locate, locate_again
from peftkit.base.identity import BaseIdentity, identify
from peftkit.base.places import remember_place
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.errors import BaseMismatch
from peftkit.events import Report, silent
from peftkit.registry.manifest import Version


@dataclass(frozen=True)
class FoundBase:
    """A base on this machine that is the one a version was trained on."""

    spec: BaseSpec
    located: LocatedBase
    identity: BaseIdentity


def find_base(
    version: Version, cache: Path, base: str | None = None, report: Report = silent
) -> tuple[BaseSpec, LocatedBase]:
    """Where `base` lies, or the base that the manifest names; nothing is compared. Raises BaseError for neither."""
    recorded = version.manifest.base
    spec = BaseSpec(source=base) if base else locate_again(recorded.source, recorded.revision, recorded.record, cache)
    return spec, locate(spec, cache, report)


def base_of(version: Version, cache: Path, base: str | None = None, report: Report = silent) -> FoundBase:
    """Find the base of a version and remember where it lies.

    Raises BaseError when it is not on this machine, and BaseMismatch, naming what differs, for another base.
    """
    spec, located = find_base(version, cache, base, report)
    identity = identify(located.folder, cache)
    recorded = version.manifest.base
    if differing := differing_parts(recorded.parts, recorded.fingerprint, identity.parts(), identity.fingerprint):
        raise BaseMismatch(
            f"{version.reference} was trained on {recorded.source}; {located.source} differs in: "
            + ", ".join(differing),
            expected="the same base, by content",
            hint="name the base that it was trained on with --base",
        )
    remember_place(identity, located.place, cache)
    return FoundBase(spec, located, identity)


def differing_parts(one: Mapping[Any, str], fingerprint: str, other: Mapping[Any, str], others: str) -> list[str]:
    """The parts in which two bases differ, in words: digests by part, and the fingerprint of each."""
    digests, theirs = ({str(part): digest for part, digest in parts.items()} for parts in (one, other))
    # What a manifest does not state is not known to be the same.
    names = dict.fromkeys([*digests, *theirs])
    differing = [name for name in names if digests.get(name) is None or digests.get(name) != theirs.get(name)]
    if not differing and fingerprint != others:
        return ["fingerprint"]
    return [name.replace("_", " ") for name in differing]
