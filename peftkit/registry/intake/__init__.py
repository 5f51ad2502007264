"""Adapters from strangers: copied into quarantine, checked against every rule of rules.py, and made harmless."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.durable import write_file
from peftkit.registry.intake.config import check_config, method_of, read_config
from peftkit.registry.intake.header import Tensor
from peftkit.registry.intake.methods import methods
from peftkit.registry.intake.quarantine import CONFIG, TENSORS, WEIGHTS, Admitted, admit
from peftkit.registry.intake.rules import RULES, AdapterRefused
from peftkit.registry.intake.shapes import check_replacements, check_shapes
from peftkit.registry.intake.tensors import check_places, check_weights

__all__ = [
    "RULES",
    "AdapterRefused",
    "Admitted",
    "Intake",
    "admit",
    "check_config",
    "check_shapes",
    "inspect",
    "methods",
]


@dataclass(frozen=True)
class Intake:
    """An adapter that keeps every rule; `files` lie in quarantine, `sources` were taken: name → SHA-256 and bytes."""

    kind: str
    peft_type: str | None
    config: dict[str, Any] | None
    tensors: int
    parameters: int
    notes: list[str]
    left_out: list[tuple[str, str]]
    files: dict[str, tuple[str, int]]
    sources: dict[str, tuple[str, int]]


def inspect(
    source: Path,
    quarantine: Path,
    base_shapes: Mapping[str, tuple[int, ...]] | None,
    base_dtypes: Mapping[str, str] | None = None,
) -> Intake:
    """Take an adapter out of an untrusted folder into the new folder `quarantine`; AdapterRefused leaves none behind.

    Without `base_shapes` (tensor name → shape in the base's checkpoint) nothing is compared with the base.
    """
    if quarantine.exists():
        raise FileExistsError(quarantine)
    try:
        admitted = admit(source, quarantine)
        if admitted.kind == "tensors":
            return _inspect_tensors(admitted, quarantine, base_shapes)
        return _inspect_peft(admitted, quarantine, base_shapes, base_dtypes)
    except BaseException:
        shutil.rmtree(quarantine, ignore_errors=True)
        raise


def _inspect_peft(
    admitted: Admitted,
    quarantine: Path,
    base_shapes: Mapping[str, tuple[int, ...]] | None,
    base_dtypes: Mapping[str, str] | None,
) -> Intake:
    given = read_config(quarantine / CONFIG, admitted.files[CONFIG][0])
    method = method_of(given)
    tensors = check_weights(quarantine / WEIGHTS, admitted.files[WEIGHTS][0])
    config, notes = check_config(given, [tensor.name for tensor in tensors])
    places = check_places(tensors, config, method)
    notes += check_shapes(config, method, _shapes(tensors), places, base_shapes, base_dtypes)
    written = _write_config(quarantine, config)
    files = {CONFIG: written, WEIGHTS: admitted.files[WEIGHTS]}
    return _intake(admitted, tensors, notes, files, config)


def _inspect_tensors(admitted: Admitted, quarantine: Path, base_shapes: Mapping[str, tuple[int, ...]] | None) -> Intake:
    tensors = check_weights(quarantine / TENSORS, admitted.files[TENSORS][0])
    notes = check_replacements(_shapes(tensors), base_shapes)
    return _intake(admitted, tensors, notes, dict(admitted.files), None)


def _intake(
    admitted: Admitted,
    tensors: list[Tensor],
    notes: list[str],
    files: dict[str, tuple[str, int]],
    config: dict[str, Any] | None,
) -> Intake:
    return Intake(
        kind=admitted.kind,
        peft_type=config["peft_type"] if config else None,
        config=config,
        tensors=len(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        notes=notes,
        left_out=admitted.left_out,
        files=files,
        sources=dict(admitted.files),
    )


def _shapes(tensors: list[Tensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def _write_config(quarantine: Path, config: dict[str, Any]) -> tuple[str, int]:
    data = (json.dumps(config, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")
    (quarantine / CONFIG).unlink()
    write_file(quarantine / CONFIG, data)
    return hashlib.sha256(data).hexdigest(), len(data)
