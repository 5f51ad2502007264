"""The canonical PEFT folder: plain LoRA with the scaling in its factors, which every reader of PEFT folders agrees on.

rsLoRA, patterns and mixed ranks are gone, ΔW is the same; a receipt beside it says what was folded and what was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

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
from peftkit.release.export.receipt import adapter_figures, spelled, write_own, write_receipt
from peftkit.release.export.source import Cut, Source

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
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
    write_own(folder / CONFIG, spelled(made.config))
    write_own(folder / TENSORS, save({name: each.contiguous() for name, each in made.tensors.items()}))
    figures = adapter_figures(findings, errors_of(made, folder), made.rank, made.cut)
    return write_receipt(made.source, engine, findings, folder, figures)


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
