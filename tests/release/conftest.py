"""Adapters of a tiny base, held-out rows for them, and a base that is lively enough to tell models apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import write_base

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.audit import DataSpec
from peftkit.data.formats import load_rows
from peftkit.generation.forward import pad, token_nll
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.release.rows import HeldOut
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

LETTERS = {"one": "ab", "two": "xy"}
"""What each task's answers are made of."""


@dataclass
class Lab:
    """A tiny base, a registry, and adapters whose every tensor is set by the test."""

    folder: Path
    base: Path
    registry: Registry
    backbones: dict[int, Backbone] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def backbone(self, bits: int = 32) -> Backbone:
        if bits not in self.backbones:
            spec = BaseSpec(source=str(self.base))
            self.backbones[bits] = load_backbone(spec, QuantSpec(bits=bits, device="cpu"), self.cache)
        return self.backbones[bits]

    def adapter(self, name: str, *, bits: int = 32, seed: int = 1, size: float = 0.1, r: int = 4) -> Version:
        """An adapter whose LoRA matrices are normal numbers times `size`."""

        def draw(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return {key: size * torch.randn(shape, generator=generator) for key, shape in sorted(shapes.items())}

        return self.publish(name, draw, bits=bits, r=r)

    def publish(
        self,
        name: str,
        tensors: Callable[..., dict[str, torch.Tensor]],
        *,
        bits: int,
        r: int = 4,
        config: dict[str, Any] | None = None,
    ) -> Version:
        from safetensors.torch import save_file

        payload = self.folder / "payloads" / name
        payload.mkdir(parents=True, exist_ok=True)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = config or {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0,
            "bias": "none", "target_modules": targets, "base_model_name_or_path": "tiny", "inference_mode": True,
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {}
        for key, weight in self.backbone(32).model.named_parameters():
            if key.removesuffix(".weight").rsplit(".", 1)[-1] in targets:
                module = "base_model.model." + key.removesuffix(".weight")
                shapes[f"{module}.lora_A.weight"] = (r, weight.shape[1])
                shapes[f"{module}.lora_B.weight"] = (weight.shape[0], r)
        (payload / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors(config, shapes), str(payload / "adapter_model.safetensors"))
        return self.registry.publish(name, payload, self.draft(bits), base=self.backbone(bits).identity.record)

    def draft(self, bits: int) -> Draft:
        backbone = self.backbone(bits)
        identity = backbone.identity
        base = {
            "source": backbone.base.portable,
            "record": identity.id,
            "fingerprint": identity.fingerprint,
            "parts": identity.parts(),
            "quantization": backbone.quantization_record(),
        }
        return Draft(kind="peft", base=base, adapter={"method": "lora"})

    def rows(self, number: int = 60, name: str = "held.jsonl", seed: int = 0, letters: str = "abcdefgh") -> HeldOut:
        """Rows whose answers are random words of some letters; 60 of them have some 1,300 answer tokens."""
        draw = random.Random(seed)
        path = self.folder / name
        lines = [{"prompt": words(draw, "abcdefgh", 2), "completion": words(draw, letters, 4)} for _ in range(number)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = load_rows(path)
        return HeldOut(source.rows, source, DataSpec())

    def taught(self, name: str, payload: Path) -> Version:
        """Publish an adapter that was trained before."""
        return self.registry.publish(name, payload, self.draft(32), base=self.backbone(32).identity.record)


def words(draw: random.Random, letters: str, number: int) -> str:
    return " ".join("".join(draw.choice(letters) for _ in range(draw.randrange(2, 6))) for _ in range(number))


@pytest.fixture(scope="session")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose predictions are far from uniform."""
    return write_base(tmp_path_factory.mktemp("release") / "lively", seed=5, initializer_range=0.2)


@pytest.fixture
def lab(tmp_path: Path, lively: Path) -> Lab:
    return Lab(tmp_path, lively, Registry(tmp_path / "registry"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, lively: Path) -> Lab:
    """A lab for tests that only read."""
    folder = tmp_path_factory.mktemp("shared")
    return Lab(folder, lively, Registry(folder / "registry"))


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, lively: Path) -> dict[str, Path]:
    """Payloads of two adapters that have learned to answer with two letters each."""
    folder = tmp_path_factory.mktemp("taught")
    lab = Lab(folder, lively, Registry(folder / "registry"))
    return {name: _train(lab, name, letters) for name, letters in LETTERS.items()}


def _train(lab: Lab, name: str, letters: str) -> Path:
    backbone = load_backbone(BaseSpec(source=str(lab.base)), QuantSpec(bits=32, device="cpu"), lab.cache)
    examples = lab.rows(48, f"{name}.jsonl", seed=1, letters=letters).part(lab.base).examples
    tuned = inject(backbone, AdapterSpec(r=4, seed=0))
    optimizer = torch.optim.Adam(tuned.trainable.values(), lr=1e-2)
    for step in range(20):
        batch = [examples[(step * 12 + i) % len(examples)] for i in range(12)]
        loss = token_nll(tuned.model, pad(batch, backbone.tokenizer.pad_id, backbone.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save_adapter(tuned, lab.folder / name)
