"""What an export starts from: a registered version, its base on this machine, its deltas, and what it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peftkit.backbone.locate import locate, locate_again
from peftkit.base.identity import identify
from peftkit.base.places import remember_place
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.deltas.delta import Delta, Deltas, LowRank, Stacked
from peftkit.deltas.reading.read import deltas_of
from peftkit.deltas.spectrum import norm, truncated
from peftkit.errors import BaseMismatch, DeltaError
from peftkit.events import Report, silent
from peftkit.registry.store import Registry, Version
from peftkit.release.export.capabilities import Features, features_of
from peftkit.tuning.stored import Stored, read


@dataclass(frozen=True)
class Source:
    """One version, read and checked."""

    stored: Stored
    base: LocatedBase
    deltas: Deltas
    features: Features

    @property
    def version(self) -> Version:
        """The registered version."""
        return self.stored.version


@dataclass(frozen=True)
class Cut:
    """Deltas of a smaller rank, and what that cost: ‖ΔW − cut‖ / ‖ΔW‖ over all tensors, and the worst of one."""

    deltas: Deltas
    error: float
    worst: tuple[str, float]


def open_source(
    registry: Registry, reference: str, cache: Path, *, base: str | None = None, report: Report = silent
) -> Source:
    """Read a version and find its base: `base` where it is given, else the one that the manifest names.

    Raises AdapterDamaged, BaseError, BaseMismatch for another base, and DeltaError for what has no exact ΔW.
    """
    stored = read(registry.resolve(reference))
    recorded = stored.version.manifest.base
    known = BaseSpec(source=base) if base else locate_again(recorded.source, recorded.revision, recorded.record, cache)
    found = locate(known, cache, report)
    identity = identify(found.folder, cache)
    if identity.fingerprint != recorded.fingerprint:
        stated = {str(part): digest for part, digest in recorded.parts.items()}
        differing = [part for part, digest in identity.parts().items() if stated.get(part) != digest]
        raise BaseMismatch(
            f"{stored.version.reference} was trained on {recorded.source}; {found.source} differs in: "
            + (", ".join(differing) or "fingerprint"),
            expected="the same base, by content",
            hint="name the base that it was trained on with --base",
        )
    remember_place(identity, found.place, cache)
    deltas = _deltas(stored, found.folder)
    return Source(stored, found, deltas, features_of(deltas, stored.config, recorded.quantization))


def _deltas(stored: Stored, folder: Path) -> Deltas:
    try:
        return deltas_of(stored, folder)
    except DeltaError as error:
        version = stored.version
        offer = f"peftkit export {version.name} --out FOLDER writes it as it is stored, for PEFT and peftkit"
        raise DeltaError(error.fact, expected=error.expected, hint=error.hint or offer) from error


def cut_to(source: Source, rank: int) -> Cut:
    """Every LoRA of a larger rank as the best one of `rank` (truncated SVD), and the error of that.

    Raises DeltaError for a rank below 1 and for LoRA of fused experts.
    """
    if rank < 1:
        raise DeltaError(f"rank {rank}", expected="a rank of 1 or more", hint="--rank 16")
    changes: dict[str, Delta] = {}
    lost, whole, worst = 0.0, 0.0, ("", 0.0)
    for tensor, delta in source.deltas.changes.items():
        if isinstance(delta, Stacked):
            raise DeltaError(f"{tensor} holds fused experts", expected="linear layers", hint="leave --rank out")
        changes[tensor] = delta
        if not isinstance(delta, LowRank):
            continue
        length, error = norm(delta), 0.0
        if delta.rank > rank:
            changes[tensor], error = truncated(delta, rank)
        lost, whole = lost + error**2, whole + length**2
        if length and error / length > worst[1]:
            worst = tensor, error / length
    return Cut(replace(source.deltas, changes=changes), math.sqrt(lost / whole) if whole else 0.0, worst)


def with_cut(source: Source, rank: int | None) -> tuple[Source, Cut | None]:
    """The source with ranks cut to `rank`, where one is given."""
    if rank is None:
        return source, None
    cut = cut_to(source, rank)
    recorded = source.version.manifest.base
    features = features_of(cut.deltas, source.stored.config, recorded.quantization)
    return replace(source, deltas=cut.deltas, features=features), cut


def base_of(source: Source) -> Mapping[str, str | None]:
    """The base as a receipt names it: nothing of this machine."""
    recorded = source.version.manifest.base
    return {"source": recorded.source, "revision": recorded.revision, "fingerprint": recorded.fingerprint}
