"""Backbones on the tiny base, adapters that differ from their base, and a registry to keep them in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def make_base(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """`write_base` of the top conftest: a tiny random Llama base on disk."""
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py")).write_base


@pytest.fixture
def load(tiny_base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Load the tiny base (or another folder) with QuantSpec fields."""
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec

    def load(folder: Path | None = None, **quant: Any) -> Any:
        return load_backbone(BaseSpec(source=str(folder or tiny_base)), QuantSpec(**quant), tmp_path / "cache")

    return load


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    from peftkit.registry.store import Registry

    return Registry(tmp_path / "registry")


def _draft(tuned: Any) -> dict[str, Any]:
    from peftkit.recipe.fields import base_fields

    base = base_fields(tuned.backbone)
    return {"kind": "peft", "base": base, "adapter": tuned.spec.model_dump(), "parents": list(tuned.parents)}


@pytest.fixture(scope="session")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Saved adapters by what they were made of, so that a hundred tests save a dozen adapters."""
    return {"": (tmp_path_factory.mktemp("payloads"), {})}


@pytest.fixture
def adapter(
    load: Callable[..., Any], registry: Any, tmp_path: Path, payloads: dict[str, tuple[Any, ...]]
) -> Callable[..., Any]:
    """Publish an adapter of the tiny base whose every tensor is random: it moves the logits a good deal.

    `change` may edit its files before they are published.
    """
    import torch

    from peftkit.registry.manifest import Draft
    from peftkit.tuning.inject import inject, save_adapter
    from peftkit.tuning.methods import AdapterSpec

    def make(folder: Path | None, seed: int, bits: int, settings: dict[str, Any]) -> tuple[Any, ...]:
        key = repr((folder, seed, bits, sorted(settings.items())))
        if key not in payloads:
            tuned = inject(load(folder, bits=bits), AdapterSpec(r=4, lora_alpha=8, seed=seed, **settings))
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in tuned.trainable.values():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            folder = save_adapter(tuned, payloads[""][0] / str(len(payloads)))
            payloads[key] = folder, _draft(tuned), tuned.backbone.identity.record
        return payloads[key]

    def adapter(
        name: str = "tickets",
        *,
        seed: int = 1,
        bits: int = 4,
        folder: Path | None = None,
        change: Callable[[Path], None] = lambda folder: None,
        **settings: Any,
    ) -> Any:
        source, fields, record = make(folder, seed, bits, settings)
        payload = Path(shutil.copytree(source, tmp_path / "payload" / name, dirs_exist_ok=True))
        change(payload)
        return registry.publish(name, payload, Draft.model_validate(fields), base=record)

    return adapter


@pytest.fixture
def publish(load: Callable[..., Any], registry: Any) -> Callable[..., Any]:
    """Publish a folder as an adapter of the tiny base, of kind `peft` unless told."""
    from peftkit.registry.manifest import Draft

    bases: dict[Path | None, dict[str, Any]] = {}

    def publish(name: str, folder: Path, kind: str = "peft", base: Path | None = None) -> Any:
        if base not in bases:
            backbone = load(base, bits=32)
            identity = {"fingerprint": backbone.identity.fingerprint, "parts": backbone.identity.parts()}
            bases[base] = {"source": backbone.base.source, **identity}
        return registry.publish(name, folder, Draft(kind=kind, base=bases[base]))

    return publish
