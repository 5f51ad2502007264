"""What an export starts from: a registered version, its base on this machine, its deltas, and what it has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from peftkit.base.ref import LocatedBase
from peftkit.deltas.delta import Delta, Deltas, LowRank, Stacked
from peftkit.deltas.reading.read import deltas_of
from peftkit.deltas.spectrum import norm, truncated
from peftkit.errors import DeltaError
from peftkit.events import Report, silent
from peftkit.registry.store import Registry, Version
from peftkit.release.base_of import base_of
from peftkit.release.export.capabilities import Features, features_of
from peftkit.release.recommend import needs_choice
from peftkit.release.repaired import repairs
from peftkit.tuning.attach import head_of
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

    @property
    def repaired(self) -> bool:
        """Whether it begins with what quantization took from its base."""
        return "repaired" in self.features.found


MOST_LOST = 0.05
"""‖ΔW − cut‖ / ‖ΔW‖ that a smaller rank may cost unasked, as in combining."""


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

    Raises AdapterDamaged, BaseError, BaseMismatch for another base, and DeltaError for what has no exact ΔW or a
    task's head.
    """
    stored = read(registry.resolve(reference))
    _check_answers(stored.version)
    found = base_of(stored.version, cache, base, report).located
    deltas = _deltas(stored, found.folder)
    quantized, repaired = needs_choice(stored.version), repairs(registry, [stored.version]) is not None
    features = features_of(deltas, stored.config, quantized=quantized, repaired=repaired)
    return Source(stored, found, deltas, features)


def _check_answers(version: Version) -> None:
    """Raise DeltaError for an adapter of a task: the engines hold language models, and would lose its head."""
    head = head_of(version)
    if head is not None:
        raise DeltaError(
            f"{version.reference} has a {head.kind} head, and exports for engines are of language models",
            expected="an adapter with a language head",
            hint=f"peftkit export {version.name} --out FOLDER writes it as it is stored, head included, for PEFT and "
            f"peftkit; peftkit merge {version.name} --out FOLDER writes a model for transformers",
        )


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


def with_cut(source: Source, rank: int | None, *, force: bool = False) -> tuple[Source, Cut | None]:
    """The source with ranks cut to `rank`, where one is given; more than 5 % lost is a DeltaError unless forced."""
    if rank is None:
        return source, None
    cut = cut_to(source, rank)
    if cut.error > MOST_LOST and not force:
        tensor, error = cut.worst
        raise DeltaError(
            f"at rank {rank}, {cut.error:.1%} of ‖ΔW‖ of {source.version.reference} is lost; "
            f"most in {tensor}: {error:.1%}",
            expected=f"at most {MOST_LOST:.0%}",
            hint="a higher --rank, or --force to write it all the same",
        )
    quantized = needs_choice(source.version)
    features = features_of(cut.deltas, source.stored.config, quantized=quantized, repaired=source.repaired)
    return replace(source, deltas=cut.deltas, features=features), cut
