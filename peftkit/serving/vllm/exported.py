"""Versions as vLLM reads them: one canonical folder each, as `peftkit export --to vllm` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftkit.events import Event, Report, Warned
from peftkit.registry.store import Registry, Version
from peftkit.release.export.entry import ExportOptions, export_for


@dataclass(frozen=True)
class Exported:
    """The files of one version."""

    outer: Path
    """All that was written."""
    folder: Path
    """The adapter."""
    rank: int
    bytes: int


def export_version(
    registry: Registry, version: Version, base: Path, out: Path, cache: Path, report: Report
) -> Exported:
    """Write a version into the new folder `out`, which is complete or absent.

    Raises DeltaError for what vLLM would refuse or misread, BaseMismatch for a version of another base, and
    AdapterDamaged.
    """

    def warnings(event: Event) -> None:
        if isinstance(event, Warned):
            report(event)

    options = ExportOptions(base=str(base))
    receipt = export_for("vllm", registry, [version.reference], out, cache, options=options, report=warnings)
    ((name, figures),) = receipt.versions.items()
    folder = out / name
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(out, folder, int(figures["rank"]), size)
