"""One entry for every engine: what it refuses before it looks at an adapter, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import BaseMismatch, DeltaError, RegistryError

Export = Callable[..., Any]


def test_a_lora_gguf_is_measured_on_the_file(export: Export) -> None:
    import gguf

    receipt = export("gguf", "all")
    assert set(receipt.files) == {"adapter.gguf", "peftkit_export.json"}
    (each,) = receipt.versions.values()
    assert each == json.loads((receipt.folder / "peftkit_export.json").read_text())
    assert len(each["error"]["tensors"]) == 14
    assert 0 <= each["error"]["max"] <= 2**-23
    held = gguf.GGUFReader(receipt.folder / "adapter.gguf")
    assert len(held.tensors) == 2 * 14
    (half,) = export("gguf", "plain", dtype="float16").versions.values()
    assert 2**-16 < half["error"]["max"] < 2**-9  # float16 keeps 11 bits, of both factors


@pytest.mark.parametrize("variant", ["embedding", "head", "both"])
def test_what_llama_cpp_has_no_place_for_is_refused_by_the_table(variant: str, export: Export, tmp_path: Path) -> None:
    for engine in ("gguf", "ollama"):
        with pytest.raises(DeltaError) as caught:
            export(engine, variant, out=tmp_path / "out")
        assert "parts the head from the embedding" in caught.value.fact
        assert "llama.cpp#9065" in caught.value.fact
    assert list(tmp_path.iterdir()) == []


def test_wrong_calls_are_refused_before_anything_is_read(export: Export, registry: Any, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    calls: list[tuple[type[Exception], str, str, tuple[str, ...], Path, dict[str, Any]]] = [
        (DeltaError, "no export for 'tensorrt'", "tensorrt", ("plain",), tmp_path / "a", {}),
        (DeltaError, "2 adapters for peft", "peft", ("plain", "all"), tmp_path / "a", {}),
        (DeltaError, "no adapter is named", "vllm", (), tmp_path / "a", {}),
        (DeltaError, "is named twice", "vllm", ("plain", "plain"), tmp_path / "a", {}),
        (DeltaError, "force without a merge", "gguf", ("plain",), tmp_path / "a", {"force": True}),
        (DeltaError, "rank 0", "peft", ("plain",), tmp_path / "a", {"rank": 0}),
        (DeltaError, "dtype 'q8_0'", "gguf", ("plain",), tmp_path / "a", {"dtype": "q8_0"}),
        (RegistryError, "is not empty", "peft", ("plain",), full, {}),
        (RegistryError, "inside the registry", "peft", ("plain",), registry.root / "out", {}),
        (RegistryError, "nobody", "peft", ("nobody",), tmp_path / "a", {}),
    ]
    for error, says, engine, names, out, options in calls:
        with pytest.raises(error, match=says):
            export(engine, *names, out=out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_another_base_is_named(export: Export, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatch, match="differs in: weights"):
        export("peft", "plain", out=tmp_path / "out", base=str(tiny_base))
    assert not (tmp_path / "out").exists()


def test_a_merged_model_holds_what_an_adapter_cannot(export: Export, biased_base: Path) -> None:
    """DoRA, whole modules, a parted head: one GGUF of the merged model, compared tensor by tensor."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    receipt = export("gguf", "norms", merged=True, dtype="float32")
    assert set(receipt.files) == {"model.gguf", "peftkit_export.json"}
    (each,) = receipt.versions.values()
    assert each["merge"]["settings"]["onto"] == "original"
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(receipt.folder / "model.gguf").tensors}
    base = load_file(biased_base / "model.safetensors")
    assert np.array_equal(held["output_norm.weight"], np.full(64, 2.0, np.float32))
    assert np.array_equal(held["token_embd.weight"], base["model.embed_tokens.weight"])
    for variant in ("dora", "whole"):
        assert "model.gguf" in export("gguf", variant, merged=True).files


def test_ollama_gets_a_checked_modelfile_over_the_base_or_the_merged_model(export: Export) -> None:
    receipt = export("ollama", "ranks")
    assert set(receipt.files) == {"Modelfile", "adapter.gguf", "base.gguf", "peftkit_export.json"}
    assert receipt.command == ("ollama", "create", "ranks", "-f", "Modelfile")
    lines = (receipt.folder / "Modelfile").read_text().splitlines()
    assert "FROM ./base.gguf" in lines
    assert "ADAPTER ./adapter.gguf" in lines
    merged = export("ollama", "whole", merged=True)
    assert set(merged.files) == {"Modelfile", "model.gguf", "peftkit_export.json"}
    text = (merged.folder / "Modelfile").read_text()
    assert "FROM ./model.gguf" in text
    assert "ADAPTER" not in text
