"""The canonical PEFT folder: plain LoRA with the scaling in its factors, which every reader of PEFT folders agrees on.

rsLoRA, patterns and mixed ranks are gone, ΔW is the same; a receipt beside it says what was folded and what was lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from peftkit import durable
from peftkit.base.dense import dense_tensors
from peftkit.base.ref import read_config
from peftkit.canonical import strict_json
from peftkit.deltas.canonical import canonical_lora
from peftkit.deltas.delta import Deltas, LowRank
from peftkit.deltas.parts import low_rank_parts
from peftkit.deltas.reading.read import read_deltas
from peftkit.deltas.spectrum import norm, relative, stacked
from peftkit.errors import DeltaError
from peftkit.release.export.capabilities import Finding
from peftkit.release.export.source import Cut, Source
from peftkit.version import __version__

CONFIG, TENSORS, RECEIPT = "adapter_config.json", "adapter_model.safetensors", "peftkit_export.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Canonical:
    """One adapter's canonical files in memory, and the deltas as they were registered."""

    source: Source
    original: Deltas
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    cut: Cut | None

    @property
    def rank(self) -> int:
        """The one rank of all its factors."""
        return int(self.config["r"])


def canonical(source: Source, original: Deltas, cut: Cut | None = None, dtype: str | None = None) -> Canonical:
    """The canonical checkpoint of what is in `source`; `original` are its deltas before they were cut.

    Raises DeltaError for what is no LoRA, for a dtype that is not known, and for numbers that overflow in it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise DeltaError(f"dtype {dtype!r}", expected=" or ".join(DTYPES), hint="--dtype bfloat16")
    recorded = source.version.manifest.base
    modules = {name.rpartition(".")[0] for name in dense_tensors(source.base.folder)}
    made = canonical_lora(
        source.deltas, base_model=recorded.source, revision=recorded.revision, modules=sorted(modules)
    )
    tensors = {name: each.to(DTYPES[dtype]) if dtype else each for name, each in made.tensors.items()}
    if overflown := sorted(name for name, each in tensors.items() if not torch.isfinite(each).all()):
        raise DeltaError(
            f"{source.version.reference}: {overflown[0]} has no finite value in {dtype}",
            expected="factors that the dtype can hold",
            hint="--dtype float32",
        )
    return Canonical(source, original, made.config, tensors, cut)


def write_canonical(made: Canonical, folder: Path, engine: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Write the files into the new folder `folder`, read them back, and write the receipt that is returned."""
    folder.mkdir(parents=True)
    _write(folder / CONFIG, _json(made.config))
    _write(folder / TENSORS, save({name: each.contiguous() for name, each in made.tensors.items()}))
    receipt = _receipt(made, folder, engine, findings)
    _write(folder / RECEIPT, _json(receipt))
    return receipt


def errors_of(made: Canonical, folder: Path) -> dict[str, float]:
    """‖ΔW registered − ΔW written‖ / ‖ΔW registered‖ of every tensor, from the files in `folder` as they lie there.

    Raises DeltaError when the files do not change the same tensors.
    """
    base = made.source.base.folder
    config, tensors = strict_json((folder / CONFIG).read_bytes()), load((folder / TENSORS).read_bytes())
    assert isinstance(config, dict)  # written just now
    reference = made.source.version.reference
    back = read_deltas(reference, "peft", config, tensors, dense_tensors(base), read_config(base))
    if differing := sorted(made.original.changes.keys() ^ back.changes.keys()):
        raise DeltaError(
            f"the export of {reference} does not change the tensors that it does: {', '.join(differing[:5])}",
            expected="the same tensors",
            hint="this is a bug in peftkit; nothing was written",
        )
    return {tensor: _error(made.original, back, tensor) for tensor in sorted(back.changes)}


def _error(original: Deltas, written: Deltas, tensor: str) -> float:
    mine, theirs = (low_rank_parts(deltas.changes[tensor]) for deltas in (original, written))
    if mine is None or theirs is None:  # canonical_lora refused it
        raise DeltaError(f"{tensor} has no factors", expected="LoRA")
    lost = sum(norm(_difference(a, b)) ** 2 for a, b in zip(mine, theirs, strict=True))
    return relative(lost**0.5, sum(norm(part) ** 2 for part in mine) ** 0.5)


def _difference(one: LowRank, other: LowRank) -> LowRank:
    return stacked([one, other], [1.0, -1.0])


def _receipt(made: Canonical, folder: Path, engine: str, findings: Sequence[Finding]) -> dict[str, Any]:
    receipt = facts_of(made.source, engine, findings, errors_of(made, folder), made.rank, made.cut)
    receipt["output"] = {name: durable.digest_file(folder / name) for name in (CONFIG, TENSORS)}
    return receipt


def start_of(source: Source, engine: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """What every export's receipt says first: who reads it, and what went in."""
    version, base = source.version, source.version.manifest.base
    return {
        "type": "export",
        "engine": engine,
        "peftkit": __version__,
        "version": version.reference,
        "base": {"source": base.source, "revision": base.revision, "fingerprint": base.fingerprint},
        "input": {path: file.sha256 for path, file in sorted(version.manifest.files.items())},
        "findings": [finding.describe() for finding in findings if finding.cell.outcome != "ok"],
    }


def facts_of(
    source: Source,
    engine: str,
    findings: Sequence[Finding],
    errors: Mapping[str, float],
    rank: int,
    cut: Cut | None,
) -> dict[str, Any]:
    """An adapter's receipt: what was folded or cut, and the errors that were measured on the files."""
    worst = max(errors, key=lambda tensor: errors[tensor])
    return start_of(source, engine, findings) | {
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


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    durable.write_file(path, data)
    path.chmod(0o644)  # registry files never change; an exported copy belongs to the user
