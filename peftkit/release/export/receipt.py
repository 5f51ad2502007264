"""The receipt beside an export's files: what went in, what came out, and the figures of the engine's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.registry import receipts
from peftkit.release.export.capabilities import Finding
from peftkit.release.export.source import Cut, Source
from peftkit.version import __version__

RECEIPT = "peftkit_export.json"


def write_receipt(
    source: Source, engine: str, findings: Sequence[Finding], folder: Path, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Digest every file in `folder`, and write and return the receipt; its fields are in registry/FORMAT.md."""
    version, base = source.version, source.version.manifest.base
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    receipt = receipts.exported(
        engine=engine,
        peftkit=__version__,
        version=version.reference,
        base={"source": base.source, "revision": base.revision, "fingerprint": base.fingerprint},
        input={path: file.sha256 for path, file in sorted(version.manifest.files.items())},
        output={str(path.relative_to(folder)): durable.digest_file(path) for path in files},
        findings=[finding.describe() for finding in findings if finding.cell.outcome != "ok"],
        **figures,
    )
    write_own(folder / RECEIPT, spelled(receipt))
    return receipt


def adapter_figures(
    findings: Sequence[Finding], errors: Mapping[str, float], rank: int, cut: Cut | None
) -> dict[str, Any]:
    """An adapter's figures: what was folded or cut, and the errors that were measured on the files."""
    worst = max(errors, key=lambda tensor: errors[tensor])
    return {
        "rank": rank,
        "folded": [finding.feature for finding in findings if finding.cell.outcome == "folded"],
        "cut": {"rank": rank, "error": cut.error, "worst": list(cut.worst)} if cut else None,
        "error": {
            "what": "‖ΔW registered - ΔW written‖ / ‖ΔW registered‖ of each tensor, from the files read back",
            "max": errors[worst],
            "tensor": worst,
            "tensors": dict(errors),
        },
    }


def spelled(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and a line end."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def write_own(path: Path, data: bytes) -> None:
    """Write a file of the user's: registry files never change, an exported copy may."""
    durable.write_file(path, data)
    path.chmod(0o644)
