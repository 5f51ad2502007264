"""Registered tiny adapters without training: written by the hundred, and what each computes alone by PEFT itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tiny_bases import write_base
from tuning.method_zoo import reload

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.seats import Seat
from peftkit.registry.manifest import Draft, File, Version, complete, compute_id, encode
from peftkit.registry.store import Registry

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90], [1, 9, 8, 7, 6, 5, 4]])
TARGETS = ("q_proj", "v_proj", "down_proj")


@dataclass
class Lab:
    """A tiny base that is lively enough to tell adapters apart, and a registry."""

    folder: Path
    base: Path
    loaded: dict[int, Backbone] = field(default_factory=dict)

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "registry")

    def backbone(self, bits: int = 32) -> Backbone:
        if bits not in self.loaded:
            self.loaded[bits] = self.fresh(bits)
        return self.loaded[bits]

    def fresh(self, bits: int = 32) -> Backbone:
        """A backbone that nobody else has: training changes it."""
        quant = QuantSpec.model_validate({"bits": bits, "device": "cpu"})
        return load_backbone(BaseSpec(source=str(self.base)), quant, self.folder / "cache")

    def draft(self, kind: str = "peft", backbone: Backbone | None = None) -> Draft:
        used = backbone or self.backbone()
        identity = used.identity
        base = {"source": used.base.portable, "fingerprint": identity.fingerprint, "parts": identity.parts()}
        return Draft.model_validate({"kind": kind, "base": base})

    def publish(self, name: str, folder: Path, kind: str = "peft", aliases: tuple[str, ...] = ()) -> Version:
        """A folder as a version of the registry."""
        return self.registry.publish(name, folder, self.draft(kind), aliases)

    def payload(self, name: str, seed: int, r: int = 4, targets: tuple[str, ...] = TARGETS, **config: Any) -> Path:
        """A folder with a LoRA whose every tensor is random."""
        folder = self.folder / "payloads" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in self._files(seed, r, targets, config).items():
            (folder / path).write_bytes(content)
        return folder

    def lora(self, name: str, seed: int, **settings: Any) -> Version:
        """A published LoRA whose every tensor is random."""
        return self.publish(name, self.payload(f"{name}-{seed}", seed, **settings))

    def written(self, name: str, seed: int, r: int = 4) -> Version:
        """The same as `lora`, written without the registry's locks and syncs: a thousand of them in seconds."""
        files = self._files(seed, r, TARGETS, {})
        promised = {path: File(sha256=_sha256(content), bytes=len(content)) for path, content in files.items()}
        manifest = complete(self.draft(), name, promised)
        content = encode(manifest)
        folder = self.folder / "many" / name / "versions" / compute_id(content)
        folder.mkdir(parents=True)
        for path, data in {**files, "manifest.json": content}.items():
            (folder / path).write_bytes(data)
        return Version(name, folder.name, folder, manifest)

    def alone(self, version: Version) -> torch.Tensor:
        """What PEFT's own loader makes of the version's files, as logits."""
        return logits(reload(copy.deepcopy(self.backbone().model), version.path))

    def _files(self, seed: int, r: int, targets: tuple[str, ...], config: Mapping[str, Any]) -> dict[str, bytes]:
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "bias": "none",
            "target_modules": list(targets), "base_model_name_or_path": "tiny", **config,
        }  # fmt: skip
        draw, tensors = torch.Generator().manual_seed(seed), {}
        for path, layer in self.backbone().model.named_modules():
            if path.rpartition(".")[2] in targets:
                out, into = layer.weight.shape
                module = f"base_model.model.{path}"
                tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(r, into, generator=draw)
                tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(out, r, generator=draw) / r
        return {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": save(tensors)}


def make_lab(folder: Path, **settings: Any) -> Lab:
    """A lab with a base of its own in `folder`."""
    return Lab(folder, write_base(folder / "base", seed=5, initializer_range=0.2, **settings))


def logits(model: Any) -> torch.Tensor:
    """Of two prompts, shape (2, length, vocabulary)."""
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
    return out


def damage(path: Path) -> bytes:
    """Turn over the last bit of a file; returns what it held."""
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def computed(seat: Seat | None) -> torch.Tensor:
    assert seat is not None
    with seat.model.seated([seat.slot] * len(IDS), IDS.shape[1]) as model:
        return logits(model)


def asked(fleet: Fleet, name: str | None) -> torch.Tensor:
    """What a name computes now; its seat is given back."""
    seat = fleet.seat(fleet.identify(name))
    found = computed(seat)
    assert seat is not None
    fleet.release(seat)
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4)


def names(fleet: Fleet) -> list[str]:
    return [reference.partition("@")[0] for reference in fleet.statistics().resident]


def bytes_of(lab: Lab, r: int, slots: int = 1) -> int:
    """Of LoRAs of the lab's targets in float32, computed from the base's shapes."""
    layers = [layer for path, layer in lab.backbone().model.named_modules() if path.rpartition(".")[2] in TARGETS]
    return slots * 4 * r * sum(sum(layer.weight.shape) for layer in layers)
