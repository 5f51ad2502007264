"""The table of what engines read: whole, sourced, and nothing that it calls misread is ever written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from release.export.conftest import LORA

from peftkit.errors import DeltaError
from peftkit.release.export.capability_table import BLOCKING, CELLS, FEATURES, Engine, Outcome

Export = Callable[..., Any]
BLOCKED = {
    ("peft", "dora"): "dora",
    ("peft", "whole"): "modules_to_save",
    ("peft", "ia3"): "method",
    ("peft", "norms"): "vectors",
    ("peft", "tokens"): "token_rows",
    ("peft", "vocabulary"): "vocabulary",
    ("vllm", "tokens"): "token_rows",
    ("vllm", "vocabulary"): "vocabulary",
    ("peft", "biases"): "bias",
    ("vllm", "biases"): "bias",
    ("gguf", "dora"): "dora",
    ("gguf", "vocabulary"): "vocabulary",
    ("vllm", "dora"): "dora",
    ("vllm", "whole"): "modules_to_save",
    ("vllm", "ia3"): "method",
    ("vllm", "norms"): "vectors",
    ("vllm", "bias"): "lora_bias",
}


def test_the_table_covers_every_engine_and_feature() -> None:
    cells = [(engine, feature, cell) for engine, row in CELLS.items() for feature, cell in row.items()]
    assert set(CELLS) == set(get_args(Engine))
    assert all(set(row) == set(FEATURES) for row in CELLS.values())
    assert len(cells) == 5 * 22
    for engine, feature, cell in cells:
        assert cell.outcome in get_args(Outcome), (engine, feature)
        assert cell.fact, (engine, feature)
        assert cell.source, (engine, feature)
        assert cell.instead or cell.outcome not in BLOCKING, (engine, feature)


@pytest.mark.parametrize("variant", LORA)
def test_features_are_computed_from_the_adapter(variant: str, registry: Any, cache_folder: Path) -> None:
    from peftkit.release.export.source import open_source

    linear = {"linear"}
    expected = {
        "plain": linear,
        "rslora": linear | {"rslora"},
        "ranks": linear | {"rank_pattern", "mixed_ranks"},
        "alphas": linear | {"alpha_pattern"},
        "all": linear | {"rslora", "rank_pattern", "alpha_pattern", "mixed_ranks"},
        "bias": linear | {"lora_bias", "rslora"},
        "embedding": linear | {"embedding", "tied"},
        "head": linear | {"head", "tied"},
        "both": {"embedding", "head", "alpha_pattern", "tied"},
    }
    features = open_source(registry, variant, cache_folder).features
    assert set(features.found) == expected[variant]
    assert features.rank == (8 if variant in ("ranks", "all") else 4)


@pytest.mark.parametrize(("engine", "variant"), BLOCKED)
def test_what_an_engine_refuses_or_misreads_is_not_written(
    engine: str, variant: str, export: Export, tmp_path: Path
) -> None:
    with pytest.raises(DeltaError) as caught:
        export(engine, variant, out=tmp_path / "out")
    feature = BLOCKED[engine, variant]
    assert FEATURES[feature] in caught.value.fact
    assert CELLS[engine][feature].source in caught.value.fact  # type: ignore[index]
    assert caught.value.hint
    assert f"peftkit merge {variant}" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_everything_that_blocks_is_said_at_once(export: Export, tmp_path: Path) -> None:
    with pytest.raises(DeltaError) as caught:
        export("vllm", "dora", "plain", "bias", "whole", out=tmp_path / "out")
    for name, feature in (("dora", "dora"), ("bias", "lora_bias"), ("whole", "modules_to_save")):
        assert f"{name} cannot be exported for vllm" in caught.value.fact
        assert FEATURES[feature] in caught.value.fact
    assert "plain" not in caught.value.fact
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_trained_over_a_quantized_base_is_exported_with_a_warning() -> None:
    import torch

    from peftkit.deltas.delta import Deltas, LowRank, Place
    from peftkit.events import Event, Warned
    from peftkit.release.export.capabilities import check, features_of, say

    delta = LowRank((4, 3), torch.ones(4, 600), torch.ones(600, 3))
    deltas = Deltas("a@1", {"q.weight": delta}, {"q.weight": Place("q", "linear")})
    features = features_of(deltas, {"peft_type": "LORA"}, quantized=True)
    events: list[Event] = []
    say(check("gguf", features), events.append)
    assert [type(event) for event in events] == [Warned]
    assert {finding.feature for finding in check("vllm", features) if finding.blocking} == {"rank"}
    assert not any(finding.blocking for finding in check("peft", features))
