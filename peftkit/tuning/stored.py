"""A version's files, read once: what was hashed is what is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from peftkit.canonical import strict_json
from peftkit.errors import AdapterDamaged
from peftkit.registry.manifest import File
from peftkit.registry.store import Version
from peftkit.registry.verify import check

_TENSORS = {"peft": "adapter_model.safetensors", "tensors": "tensors.safetensors"}
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Stored:
    """A version in memory: its PEFT configuration (empty for kind `tensors`) and its tensors on the CPU."""

    version: Version
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def read(version: Version) -> Stored:
    """Read every file of a version once, compare its digest, and parse exactly those bytes.

    Raises AdapterDamaged when anything differs from the manifest; the paths are never opened a second time.
    """
    problems = check(version, read_data=False)
    contents: dict[str, bytes] = {}
    if not problems:
        for relative, promised in version.manifest.files.items():
            try:
                contents[relative] = (version.path / relative).read_bytes()
            except OSError as error:
                problems.append(f"{relative} cannot be read: {error}.")
                continue
            problems += _differences(relative, contents[relative], promised)
    if problems:
        raise _damaged(version, problems)
    try:
        config = strict_json(contents[_CONFIG]) if version.manifest.kind == "peft" else {}
        tensors = load(contents[_TENSORS[version.manifest.kind]])
    except Exception as error:  # safetensors raises its own errors, and KeyError for a dtype torch does not have
        raise _damaged(version, [f"its files cannot be parsed: {error}"]) from error
    if not isinstance(config, dict):
        raise _damaged(version, [f"{_CONFIG} is not a JSON object."])
    return Stored(version, config, tensors)


def _differences(relative: str, content: bytes, promised: File) -> list[str]:
    digest = hashlib.sha256(content).hexdigest()
    if digest == promised.sha256:
        return []
    return [f"{relative} has the digest {digest}, {promised.sha256} was published."]


def _damaged(version: Version, problems: list[str]) -> AdapterDamaged:
    return AdapterDamaged(
        f"{version.reference} is damaged: " + "; ".join(problems),
        expected="the bytes that were published",
        hint=f"peftkit show {version.name} lists its versions",
    )
