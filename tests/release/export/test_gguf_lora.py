"""LoRA as GGUF: what llama.cpp adds, worked out in float64 from the file, is the adapter's ΔW."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_families import write_family

from peftkit.deltas.delta import Added, Deltas, LowRank, Place
from peftkit.errors import DeltaError
from peftkit.release.export import gguf_names
from peftkit.release.export.gguf_lora import write_lora_gguf

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.1.self_attn.v_proj": (32, 64),
    "model.layers.1.mlp.down_proj": (64, 96),
    "lm_head": (300, 64),
}
RANKS = (2, 4, 8, 3, 5)
SCALES = (1.0, 0.3, 4 / 8**0.5, 7.25, 2.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_family(folder, "llama")
    return folder


def adapter(shapes: dict[str, tuple[int, int]] = SHAPES) -> Deltas:
    """Mixed ranks, and a scaling of its own for each module, as rsLoRA with alpha patterns gives."""
    random = torch.Generator().manual_seed(3)
    changes, places = {}, {}
    for (module, (rows, columns)), rank, scale in zip(shapes.items(), RANKS, SCALES, strict=False):
        left = torch.randn(rows, rank, generator=random)
        right = torch.randn(rank, columns, generator=random)
        changes[f"{module}.weight"] = LowRank((rows, columns), left, right, scale)
        places[f"{module}.weight"] = Place(module, "embedding" if "embed" in module else "linear")
    return Deltas("tickets@1", changes, places)


@dataclass
class Read:
    """An adapter file as llama.cpp applies it."""

    alpha: float
    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Read:
        reader = gguf.GGUFReader(path)
        found = {key: field.contents() for key, field in reader.fields.items()}
        return cls(found["adapter.lora.alpha"], {t.name: t.data.astype(np.float64) for t in reader.tensors}, found)

    def added(self, name: str) -> np.ndarray:
        """alpha / rank · B A, the rank being the columns of B (llama-adapter.h, get_scale)."""
        a, b = self.tensors[f"{name}.lora_a"], self.tensors[f"{name}.lora_b"]
        return self.alpha / b.shape[1] * b @ a


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as ggml's rotary embedding wants them: row j of a head's first half, then row j of its second."""
    size = len(weight) // heads
    order = [head * size + half * size // 2 + j for head in range(heads) for j in range(size // 2) for half in (0, 1)]
    return weight[order]


def dense(delta: LowRank) -> np.ndarray:
    return delta.scale * delta.left.double().numpy() @ delta.right.double().numpy()


NAMES = {
    "model.layers.0.self_attn.q_proj": ("blk.0.attn_q.weight", 4),
    "model.layers.0.self_attn.k_proj": ("blk.0.attn_k.weight", 2),
    "model.layers.1.self_attn.v_proj": ("blk.1.attn_v.weight", None),
    "model.layers.1.mlp.down_proj": ("blk.1.ffn_down.weight", None),
    "lm_head": ("output.weight", None),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 2.0**-22), ("f16", 2.0**-9)])
def test_what_llama_cpp_adds_is_the_delta(base: Path, tmp_path: Path, dtype: Any, tolerance: float) -> None:
    deltas = adapter()
    written = write_lora_gguf(deltas, base, tmp_path / "a.gguf", dtype)
    read = Read.of(written.path)
    assert len(read.tensors) == written.tensors == 2 * len(SHAPES)
    assert read.alpha == max(RANKS)
    keys = ("general.type", "adapter.type", "general.architecture", "general.name")
    assert [read.fields[key] for key in keys] == ["adapter", "lora", "llama", "tickets@1"]
    for (module, (name, heads)), rank in zip(NAMES.items(), RANKS, strict=True):
        assert read.tensors[f"{name}.lora_a"].shape[0] == rank
        true = dense(deltas.changes[f"{module}.weight"])
        true = true if heads is None else paired(true, heads)
        assert np.linalg.norm(read.added(name) - true) <= tolerance * np.linalg.norm(true), module


def test_unpermuted_rows_are_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"llama": replace(gguf_names.FAMILIES["llama"], interleaved=False)}
    monkeypatch.setattr(gguf_names, "FAMILIES", planted)
    deltas = adapter()
    read = Read.of(write_lora_gguf(deltas, base, tmp_path / "a.gguf").path)
    q = dense(deltas.changes["model.layers.0.self_attn.q_proj.weight"])
    assert np.linalg.norm(read.added("blk.0.attn_q.weight") - paired(q, 4)) > 0.5 * np.linalg.norm(q)


def test_an_embedding_of_its_own_changes_places(base: Path, tmp_path: Path) -> None:
    deltas = adapter({"model.embed_tokens": (300, 64)})
    read = Read.of(write_lora_gguf(deltas, base, tmp_path / "a.gguf").path)
    a, b = read.tensors["token_embd.weight.lora_a"], read.tensors["token_embd.weight.lora_b"]
    assert (a.shape, b.shape) == ((300, 2), (64, 2))
    true = dense(deltas.changes["model.embed_tokens.weight"])
    found = np.stack([read.alpha / b.shape[1] * b @ a[token] for token in range(300)])
    np.testing.assert_allclose(found, true, rtol=1e-6, atol=1e-6)


def test_what_an_adapter_file_cannot_say_is_refused(base: Path, tmp_path: Path) -> None:
    deltas, out = adapter(), tmp_path / "a.gguf"
    name = "model.norm.weight"
    norm = Deltas("x@1", {name: Added((64,), torch.ones(64))}, {name: Place("model.norm", "other")})
    with pytest.raises(DeltaError, match=r"model\.norm\.weight.*kind values"):
        write_lora_gguf(norm, base, out)
    bias = replace(deltas, places={key: Place(place.module, "bias") for key, place in deltas.places.items()})
    with pytest.raises(DeltaError, match="a layer of kind bias"):
        write_lora_gguf(bias, base, out)
    with pytest.raises(DeltaError, match="changes nothing"):
        write_lora_gguf(Deltas("x@1", {}, {}), base, out)
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(DeltaError, match="one tensor"):
        write_lora_gguf(adapter({"model.embed_tokens": (300, 64)}), tmp_path, out)
    untied = replace(adapter({"lm_head": (300, 64)}), sources={"lm_head.weight": "model.embed_tokens.weight"})
    with pytest.raises(DeltaError, match="one tensor"):
        write_lora_gguf(untied, tmp_path, out)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}))
    with pytest.raises(DeltaError, match="convert_hf_to_gguf"):
        write_lora_gguf(deltas, tmp_path, out)
    q = deltas.changes["model.layers.0.self_attn.q_proj.weight"]
    large = replace(deltas, changes={"model.layers.0.self_attn.q_proj.weight": replace(q, scale=1e9)})
    with pytest.raises(DeltaError, match=r"lora_b holds a number that f16 cannot hold"):
        write_lora_gguf(large, base, out, "f16")
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
