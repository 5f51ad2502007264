"""Merged models as GGUF: read back by transformers' own loader, which knows nothing of the writer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, write_bpe, write_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.base import embedded as shipped
from peftkit.errors import DeltaError
from peftkit.release.export import gguf_model, gguf_names
from peftkit.release.export.gguf_model import write_model_gguf

IDS = torch.tensor([[1, 5, 17, 42, 99, 200, 3, 280, 64]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, write_family(folder, request.param)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(IDS).logits[0].double().numpy()


def loaded(path: Path) -> np.ndarray:
    return logits(AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype="float32").eval())


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_transformers_reads_the_same_logits(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    kind, folder, model = family
    written = write_model_gguf(folder, tmp_path / "m.gguf", "f32")
    assert written.tensors == len(gguf.GGUFReader(written.path).tensors)
    assert written.size == written.path.stat().st_size
    np.testing.assert_allclose(loaded(written.path), logits(model), atol=1e-5, err_msg=kind)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"interleaved": False}),
        ("qwen2", {"interleaved": True}),
        ("gemma2", {"norm_offset": 0.0}),
        ("gemma3_text", {"norm_offset": 0.0}),
    ],
)
def test_a_wrong_rule_changes_the_logits(
    kind: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_family(tmp_path / "hf", kind)
    planted = {**gguf_names.FAMILIES, kind: replace(gguf_names.FAMILIES[kind], **change)}
    monkeypatch.setattr(gguf_names, "FAMILIES", planted)
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f32").path
    assert np.abs(loaded(path) - logits(model)).max() > 1e-2


@pytest.mark.parametrize(("dtype", "step"), [("f16", 2.0**-11), ("bf16", 2.0**-8), ("q8_0", None)])
def test_smaller_types_are_rounded_once(dtype: Any, step: float | None, tmp_path: Path) -> None:
    model = write_family(tmp_path / "hf", "qwen2")
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", dtype).path
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    norm, matrix = read["blk.0.attn_norm.weight"], read["blk.0.ffn_down.weight"]
    layer = model.model.layers[0]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(norm.data, layer.input_layernorm.weight.detach().numpy())
    source = layer.mlp.down_proj.weight.detach()
    found = torch.from_numpy(gguf.dequantize(matrix.data, matrix.tensor_type).copy())
    if step is not None:
        exact = source.to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype]).float()
        assert torch.equal(found, exact)
    else:
        blocks, kept = source.reshape(-1, 32), found.reshape(-1, 32)
        # Half a step of the block's own scale, which is itself a float16 (ggml-quants.c, quantize_row_q8_0).
        bound = blocks.abs().amax(1, keepdim=True) / 127 * (0.5 + 127 * 2.0**-11)
        assert ((blocks - kept).abs() <= bound + 1e-9).all()


def test_every_block_size_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path / "hf", "llama", attention_bias=True)
    whole = write_model_gguf(tmp_path / "hf", tmp_path / "a.gguf", "bf16", name="m").path.read_bytes()
    monkeypatch.setattr(gguf_model, "_STEP", 100)
    assert write_model_gguf(tmp_path / "hf", tmp_path / "b.gguf", "bf16", name="m").path.read_bytes() == whole


def test_llama3_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    scaled = write_family(tmp_path / "hf", "llama", rope_parameters=scaling)
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f32").path
    factors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}["rope_freqs.weight"]
    np.testing.assert_allclose(plain / factors, scaled.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert factors.max() == 32.0
    assert factors.min() == 1.0


@pytest.mark.full
@pytest.mark.base
def test_tokenizer_of_the_embedded_base_equals_its_own_gguf(embedded: Path, cache: Path, tmp_path: Path) -> None:
    tokenizer_only = tmp_path / "hf"
    write_family(tokenizer_only, "llama", vocab_size=49152, hidden_size=8, intermediate_size=8, head_dim=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tokenizer_only / name).unlink(missing_ok=True)
        os.link(embedded / name, tokenizer_only / name)
    ours = fields(write_model_gguf(tokenizer_only, tmp_path / "m.gguf", "f16").path)
    theirs = fields(shipped.gguf_path("smollm2-135m", cache))
    keys = {key for key in theirs if key.startswith("tokenizer.")}
    assert len(keys) == 12
    # transformers 5.23 does not know the name smollm and splits as GPT-2 does; what trained the adapter counts.
    assert {key for key in keys if ours[key] != theirs[key]} == {"tokenizer.ggml.pre"}
    assert ours["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_metadata_can_come_from_the_bases_own_file(kind: str, tmp_path: Path) -> None:
    model = write_family(tmp_path / "hf", kind)
    base = write_model_gguf(tmp_path / "hf", tmp_path / "base.gguf", "q8_0").path
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f32", name="mine", like=base).path
    np.testing.assert_allclose(loaded(path), logits(model), atol=1e-5)
    before, after = fields(base), fields(path)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"general.name", "general.file_type", "general.quantization_version", "GGUF.kv_count"}
    write_family(tmp_path / "other", kind, intermediate_size=64)
    with pytest.raises(DeltaError, match=r"ffn_\w+\.weight is \(\d+, \d+\), here \(\d+, \d+\)"):
        write_model_gguf(tmp_path / "other", tmp_path / "x.gguf", "f32", like=base)


@pytest.mark.parametrize("tied", [True, False])
def test_another_number_of_tokens_leaves_the_bases_own_file_out(tied: bool, tmp_path: Path) -> None:
    write_family(tmp_path / "hf", "llama", tie_word_embeddings=tied)
    base = write_model_gguf(tmp_path / "hf", tmp_path / "base.gguf", "f16").path
    model = write_family(tmp_path / "grown", "llama", tie_word_embeddings=tied, vocab_size=310)
    written = write_model_gguf(tmp_path / "grown", tmp_path / "m.gguf", "f32", like=base)
    (note,) = written.notes
    assert "310 rows of tokens, the base's GGUF 300" in note
    np.testing.assert_allclose(loaded(written.path), logits(model), atol=1e-5)
    assert len(fields(written.path)["tokenizer.ggml.tokens"]) == 310
    assert not write_model_gguf(tmp_path / "hf", tmp_path / "same.gguf", "f32", like=base).notes
    write_family(tmp_path / "other", "llama", tie_word_embeddings=tied, vocab_size=310, num_key_value_heads=1)
    with pytest.raises(DeltaError, match="is not a file of this model"):
        write_model_gguf(tmp_path / "other", tmp_path / "x.gguf", "f32", like=base)


def test_a_head_parted_from_its_embedding_is_written(tmp_path: Path) -> None:
    write_family(tmp_path / "tied", "llama", tie_word_embeddings=True)
    base = write_model_gguf(tmp_path / "tied", tmp_path / "base.gguf", "f16").path
    model = write_family(tmp_path / "hf", "llama")
    for like in (None, base):
        path = write_model_gguf(tmp_path / "hf", tmp_path / f"{like is None}.gguf", "f32", like=like).path
        np.testing.assert_allclose(loaded(path), logits(model), atol=1e-5)


def test_a_tied_head_that_lies_in_the_files_is_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = write_family(tmp_path / "hf", "qwen2")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f32").path
    np.testing.assert_allclose(loaded(path), logits(model), atol=1e-5)


def test_special_tokens_and_padding_rows(tmp_path: Path) -> None:
    write_family(tmp_path / "hf", "qwen2")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    found = fields(write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f16").path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    count = len(tokenizer)
    assert found["tokenizer.ggml.tokens"][:count] == tokenizer.convert_ids_to_tokens(range(count))
    assert found["tokenizer.ggml.tokens"][count:] == [f"[PAD{i}]" for i in range(count, 300)]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.token_type"][count - 1 :] == [4] + [5] * (300 - count)
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")] == [0, 2, 0, 0]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"model_type": "gpt2"}, "no GGUF of a 'gpt2' model"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "type 'yarn'"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
        ("gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar 224"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "another order"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "softcaps"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_family(tmp_path, kind)
    edit(tmp_path, **changes)
    with pytest.raises(DeltaError, match=words):
        write_model_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))
    assert not list(tmp_path.glob(".*.new"))


def test_unknown_tensors_tokenizers_and_targets_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from tokenizers import normalizers, pre_tokenizers

    write_family(tmp_path, "qwen2")
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(DeltaError, match="exists"):
        write_model_gguf(tmp_path, out, "f32")
    assert out.read_text() == "mine"
    out.unlink()
    fast = write_bpe(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(DeltaError, match="its pre-tokenizer is"):
        write_model_gguf(tmp_path, out, "f32")
    fast = write_bpe(tmp_path)
    fast.backend_tokenizer.normalizer = normalizers.Lowercase()
    fast.save_pretrained(str(tmp_path))
    with pytest.raises(DeltaError, match="it normalizes text"):
        write_model_gguf(tmp_path, out, "f32")
    write_bpe(tmp_path, byte_fallback=True)
    with pytest.raises(DeltaError, match="SentencePiece"):
        write_model_gguf(tmp_path, out, "f32")
    write_bpe(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    huge = {**weights, "model.norm.weight": weights["model.norm.weight"] * 0 + float("inf")}
    save_file(huge, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DeltaError, match=r"output_norm\.weight holds a number that f32 cannot hold"):
        write_model_gguf(tmp_path, out, "f32")
    save_file({**weights, "model.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DeltaError, match=r"model\.extra\.weight has no place"):
        write_model_gguf(tmp_path, out, "f32")
    assert not list(tmp_path.glob("*gguf*"))
    with pytest.raises(DeltaError, match="type 'q4_k'"):
        write_model_gguf(tmp_path, out, "q4_k")  # type: ignore[arg-type]
