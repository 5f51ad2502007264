"""Small real adapters: safetensors files written byte by byte, so these tests need neither torch nor numpy."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.registry import Draft, Registry

PEFT_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def tensor_file(tensors: dict[str, bytes]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


@pytest.fixture
def make_payload(tmp_path: Path) -> Callable[..., Path]:
    def make(kind: str = "peft", seed: int = 0, folder: str | None = None) -> Path:
        target = tmp_path / (folder or f"payload-{kind}-{seed}")
        target.mkdir(parents=True, exist_ok=True)
        tensors = tensor_file({"a": struct.pack("<4f", *(seed + n for n in range(4))), "b": bytes(8)})
        if kind == "peft":
            (target / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
            (target / "adapter_model.safetensors").write_bytes(tensors)
        else:
            (target / "tensors.safetensors").write_bytes(tensors)
        return target

    return make


@pytest.fixture
def make_draft() -> Callable[..., Draft]:
    def make(kind: str = "peft", created: str = "2026-01-31T09:30:00Z", **more: Any) -> Draft:
        fields: dict[str, Any] = {
            "kind": kind,
            "created": created,
            "base": {"source": "Qwen/Qwen3-4B", "fingerprint": "f" * 64, "parts": {"weights": "3" * 64}},
            "adapter": {"method": "lora", "r": 2},
            "recipe": {"name": "qlora_sft", "sha256": "1" * 64, "config": {"lr": 1e-4}},
            "data": [{"role": "train", "source": "tickets.jsonl", "sha256": "2" * 64, "rows": 10}],
            "environment": {"torch": "2.13.0"},
            "metrics": {"before": {"loss": 2.5}, "after": {"loss": 1.25}},
        }
        return Draft.model_validate(fields | more)

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", lock_timeout=20)
