"""A sound adapter of a made-up base, published in a registry, and a hub to send it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry.exchange.fake_hub import TOKEN, FakeHub, serve
from registry.intake.adapters import BASE, sound

from peftkit.base.record import BaseRecord, TensorDigest
from peftkit.registry import Draft, Registry, Version
from peftkit.registry.exchange import Hub, ImportBase

SECRET_ROW = "Customer 4711 wants her money back"


@pytest.fixture
def record() -> BaseRecord:
    tensors = {name: TensorDigest("F32", shape, "ab" * 32) for name, shape in BASE.items()}
    return BaseRecord({"model_type": "llama"}, "cd" * 32, {"eos_token": "</s>"}, "{{ messages }}", tensors)


@pytest.fixture
def base(record: BaseRecord) -> ImportBase:
    return ImportBase(record, "someone/base", "a" * 40, "apache-2.0")


@pytest.fixture
def make_version(registry: Registry, record: BaseRecord, tmp_path: Path) -> Callable[..., Version]:
    """Publish the sound adapter as `peftkit train` does; beside it lie rows that must never leave."""

    def make(name: str = "tickets", config: dict[str, Any] | None = None, **more: Any) -> Version:
        adapter = sound()
        adapter.config |= config or {}
        payload = adapter.write(tmp_path / f"payload-{name}")
        (tmp_path / "samples.jsonl").write_text(json.dumps({"reference": SECRET_ROW}))
        (registry.root / "tickets").mkdir(parents=True, exist_ok=True)
        (registry.root / "rows.jsonl").write_text(SECRET_ROW)
        fields: dict[str, Any] = {
            "kind": "peft",
            "created": "2026-01-31T09:30:00Z",
            "base": {
                "source": "someone/base",
                "revision": "a" * 40,
                "record": record.id,
                "fingerprint": record.fingerprint,
                "parts": record.parts(),
                "quantization": {"bits": 4, "label": "NF4, bfloat16 compute"},
                "license": "apache-2.0",
            },
            "adapter": {"method": "lora", "r": 2, "lora_alpha": 4},
            "recipe": {"name": "qlora_sft", "sha256": "1" * 64, "config": {"lr": 1e-4}},
            "run": "20260131-093000-abcd",
            "data": [
                {"role": "train", "source": "tickets.jsonl", "sha256": "2" * 64, "rows": 1200, "tokens": 34567},
                {"role": "retention", "source": "acme/texts", "sha256": "3" * 64, "rows": 50, "license": "cc0-1.0"},
            ],
            "environment": {"torch": "2.13.0", "processor": "A CPU"},
            "metrics": {
                "before": {"score": {"metric": "exact", "mean": 0.25, "n": 40}},
                "after": {"score": {"metric": "exact", "mean": 0.75, "n": 40}},
                "other": {"answer_nll_change": {"point": -0.412, "low": -0.455, "high": -0.371}},
            },
            "parents": [{"name": "earlier", "version": "0123456789abcdef", "relation": "continued"}],
        }
        return registry.publish(name, payload, Draft.model_validate(fields | more), base=record)

    return make


@pytest.fixture
def version(make_version: Callable[..., Version]) -> Version:
    return make_version()


@pytest.fixture
def other(tmp_path: Path) -> Registry:
    """The registry of somebody else."""
    return Registry(tmp_path / "other", lock_timeout=20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    # hf_xet speaks a protocol of its own to a server of its own; without it the client speaks plain LFS.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        yield running


@pytest.fixture
def hub(server: FakeHub) -> Hub:
    return Hub("me/tickets", endpoint=server.url, token=TOKEN)
