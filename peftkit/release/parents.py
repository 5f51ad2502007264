"""The adapters that go into a combination: resolved, of one base, and read as deltas of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.record import BaseRecord
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.deltas.delta import Deltas
from peftkit.deltas.reading.read import deltas_of
from peftkit.errors import BaseMismatch, DeltaError
from peftkit.events import Report, Warned, silent
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry
from peftkit.release.base_of import base_of, differing_parts
from peftkit.tuning.attach import quant_of
from peftkit.tuning.stored import read


@dataclass(frozen=True)
class Parents:
    """Versions of one base, in the order they were named."""

    versions: tuple[Version, ...]
    deltas: tuple[Deltas, ...]
    base: Mapping[str, Dense]
    """The base's tensors, read from its files piece by piece."""
    spec: BaseSpec
    located: LocatedBase
    record: BaseRecord
    """What the base is, by content."""
    quantization: Mapping[str, Any] | None
    """What the base was quantized to while they were trained, as manifests say it."""

    @property
    def references(self) -> tuple[str, ...]:
        """`name@version` of each."""
        return tuple(version.reference for version in self.versions)

    def backbone(self, cache: Path, report: Report = silent) -> Backbone:
        """Their base in memory, held as it was while they were trained."""
        quant = quant_of(self.quantization or {}, None)
        return load_backbone(self.spec, quant, cache, report=report, located=self.located)


def open_parents(
    registry: Registry, references: Sequence[str], cache: Path, *, base: str | None = None, report: Report = silent
) -> Parents:
    """Resolve the adapters, find their base (or take `base`), and read their deltas.

    Raises AdapterNotFound, AdapterDamaged, DeltaError for fewer than one adapter and for what has no ΔW, BaseError
    when the base is not here, BaseMismatch when the adapters, or the base here, are not of one content.
    """
    if not references:
        raise DeltaError("no adapters are named", expected="at least one, such as tickets:0.6 tone:0.4")
    versions = tuple(registry.resolve(reference) for reference in references)
    check_same_base(versions)
    found = base_of(versions[0], cache, base, report)
    folder = found.located.folder
    deltas = tuple(deltas_of(read(version), folder) for version in versions)
    quantization = _quantization(versions, report)
    record = found.identity.record
    return Parents(versions, deltas, dense_tensors(folder), found.spec, found.located, record, quantization)


def check_same_base(versions: Sequence[Version]) -> None:
    """Raise BaseMismatch, naming what differs, when adapters were trained on bases of different content."""
    first = versions[0].manifest.base
    for version in versions[1:]:
        other = version.manifest.base
        if differing := differing_parts(first.parts, first.fingerprint, other.parts, other.fingerprint):
            raise BaseMismatch(
                f"{version.reference} was trained on {other.source}, {versions[0].reference} on {first.source}; the "
                f"two differ in: {', '.join(differing)}",
                expected="adapters of one base, by content",
                hint=f"peftkit diff {versions[0].reference} {version.reference} shows what differs",
            )


def _quantization(versions: Sequence[Version], report: Report) -> Mapping[str, Any] | None:
    """That of the first parent trained on quantized weights, so that a merge asks which weights are meant."""
    records = [version.manifest.base.quantization or {} for version in versions]
    quantized = [record for record in records if record.get("bits", 16) in (4, 8)]
    chosen = next(iter([*quantized, *records]))
    labels = {str(record.get("label", "unknown")) for record in records}
    if len(labels) > 1:
        held = chosen.get("label", "unknown")
        report(Warned(f"the adapters were trained on {', '.join(sorted(labels))} weights; {held} is taken for all"))
    return chosen or None
