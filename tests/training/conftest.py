"""Tiny tuned backbones and hand-made rows with known labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.chat import IGNORED, Example


@pytest.fixture(scope="session")
def make_base(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """`write_base` of the top conftest: a tiny random Llama base on disk."""
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py")).write_base


@pytest.fixture(scope="session")
def tuned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """An adapter injected into the tiny base (or another folder); keywords of QuantSpec or AdapterSpec."""
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec
    from peftkit.tuning.inject import inject
    from peftkit.tuning.methods import METHODS, AdapterSpec

    cache = tmp_path_factory.mktemp("cache")

    def tuned(folder: Path | None = None, **settings: Any) -> Any:
        quant = {key: value for key, value in settings.items() if key in QuantSpec.model_fields}
        adapter = {key: value for key, value in settings.items() if key not in quant}
        source = BaseSpec(source=str(folder or tiny_base))
        backbone = load_backbone(source, QuantSpec(**quant), cache)
        ranked = "r" in METHODS[adapter.get("method", "lora")].fields
        return inject(backbone, AdapterSpec(**{**({"r": 4} if ranked else {}), **adapter}))

    return tuned


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Example]]:
    """Rows of given lengths: the second half of each is the answer, unless `labelled` lists the learned positions."""

    def rows(lengths: Sequence[int], seed: int = 0, labelled: Sequence[int] | None = None) -> list[Example]:
        draw = random.Random(seed)
        made = []
        for index, length in enumerate(lengths):
            ids = [draw.randrange(3, 259) for _ in range(length)]
            learned = range(length // 2, length) if labelled is None else labelled
            labels = [token if at in learned else IGNORED for at, token in enumerate(ids)]
            made.append(Example(ids, labels, length // 2, index, f"made.jsonl:{index + 1}"))
        return made

    return rows
