"""Backbones on the tiny base and, loaded once each, on the embedded base."""

from __future__ import annotations

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


def _embedded(cache: Path, **quant: Any) -> Any:
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec

    return load_backbone(BaseSpec(), QuantSpec(**quant), cache)


@pytest.fixture(scope="session")
def embedded_nf4(embedded: Path, cache: Path) -> Any:
    """The embedded base in NF4 with double quantization, embeddings and norms in bfloat16; tests leave it as it is."""
    return _embedded(cache, bits=4, dtype="bfloat16")


@pytest.fixture(scope="session")
def embedded_int8(embedded: Path, cache: Path) -> Any:
    """The embedded base in int8; tests leave it as it is."""
    return _embedded(cache, bits=8)
