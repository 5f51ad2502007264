"""What it takes to give a seat to an adapter that has none, by where it lies: `serving.py` runs it."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from serving_mechanisms import RANK, SCALING, Adapter, backbone_of

from peftkit.backbone.load import Backbone
from peftkit.generation.fleet.fleet import Fleet
from peftkit.registry.manifest import Base, Draft
from peftkit.registry.store import Registry
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

FILE = "adapter_model.safetensors"


def publish(adapters: Sequence[Adapter], folder: Path) -> Registry:
    """A registry of the adapters, named adapter-0, adapter-1 …"""
    tuned = inject(backbone_of(), AdapterSpec(r=RANK, lora_alpha=int(RANK * SCALING)))
    shape = save_adapter(tuned, folder / "shape")
    names = set(load((shape / FILE).read_bytes()))
    identity = tuned.backbone.identity
    whole = {"source": "embedded", "fingerprint": identity.fingerprint, "parts": identity.parts()}
    base = Base.model_validate(whole)
    draft = Draft(kind="peft", base=base, adapter=tuned.spec.model_dump())
    registry = Registry(folder / "registry")
    for i, adapter in enumerate(adapters):
        tensors = {}
        for path, pair in adapter.items():
            for key, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
                tensors[f"base_model.model.{path}.{key}.weight"] = tensor.contiguous()
        assert set(tensors) == names
        made = folder / str(i)
        shutil.copytree(shape, made)
        save_file(tensors, made / FILE, metadata={"format": "pt"})
        registry.publish(f"adapter-{i}", made, draft)
        shutil.rmtree(made)
    return registry


def misses(backbone: Backbone, registry: Registry, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds for a seat: resident, from host memory, from disk; half of the adapters have a slot."""
    versions = [registry.resolve(f"adapter-{i}") for i in range(count)]
    found: dict[str, Any] = {}
    for what, host_memory in (("from_disk", 0), ("from_host", 2 << 30)):
        fleet = Fleet(backbone, registry.resolve, slots=count // 2, host_memory=host_memory)
        taken = [[_seat(fleet, version) for version in versions] for _ in range(rounds + 1)]
        counted = fleet.statistics()
        loads = {"from_disk": (counted.from_disk.count, counted.from_host.count)}.get(what)
        loads = loads or (counted.from_host.count, counted.from_disk.count - count)
        assert loads == ((rounds + (what == "from_disk")) * count, 0), counted
        found[f"{what}_ms"] = _median([span for lap in taken[1:] for span in lap])
    found["resident_ms"] = _median([_seat(fleet, versions[-1]) for _ in range(50)])
    file = versions[0].path / FILE
    found["floor_read_sha256_parse_ms"] = _median([_floor(file) for _ in range(4 * rounds)])
    return {**found, "adapter_bytes": file.stat().st_size, "times": rounds * count}


def _seat(fleet: Fleet, version: Any) -> float:
    start = time.perf_counter()
    seat = fleet.seat(version)
    span = 1000 * (time.perf_counter() - start)
    assert seat is not None
    fleet.release(seat)
    return span


def _floor(file: Path) -> float:
    start = time.perf_counter()
    content = file.read_bytes()
    hashlib.sha256(content).hexdigest()
    load(content)
    return 1000 * (time.perf_counter() - start)


def _median(spans: Sequence[float]) -> float:
    return round(statistics.median(spans), 3)
