"""LoRA adapters of a real tiny base in a registry, made without peft: random factors under the names that PEFT uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftkit.base.identity import identify
from peftkit.base.places import remember_place
from peftkit.registry import Draft, Registry, Version

TARGETS = ("q_proj", "o_proj")
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def factors(base: Path, r: int, seed: int, targets: Sequence[str] = TARGETS) -> Factors:
    """Module → (A, B) of random numbers for the attention layers of a base of `tiny_bases`, all 64 wide."""
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    draw = torch.Generator().manual_seed(seed)
    modules = [f"model.layers.{layer}.self_attn.{target}" for layer in range(layers) for target in targets]
    return {m: (torch.randn(r, 64, generator=draw), torch.randn(64, r, generator=draw)) for m in modules}


def publish(
    places: Path, base: Path, name: str, given: Factors, *, alpha: int = 4, base_fields: Mapping[str, Any] | None = None
) -> Version:
    """Publish the factors as an adapter of `base`, which this machine then knows by its content."""
    payload = places / "payloads" / name
    payload.mkdir(parents=True)
    rank = next(iter(given.values()))[0].shape[0]
    targets = sorted({module.rpartition(".")[2] for module in given})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    (payload / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": factor
        for module, pair in given.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, payload / "adapter_model.safetensors")
    identity = identify(base, places / "cache")
    remember_place(identity, base, places / "cache")
    fields = {
        "source": "tiny",
        "fingerprint": identity.fingerprint,
        "parts": identity.parts(),
        "record": identity.record.id,
    } | (base_fields or {})
    record = identity.record if fields["record"] else None
    draft = Draft.model_validate({"kind": "peft", "base": fields})
    return Registry(places / "registry").publish(name, payload, draft, base=record)
