"""What a merged GGUF keeps of the delta: against rounding worked out in numpy, and refused below 90 %."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_families import write_family

from peftkit.deltas.delta import Added, Deltas, LowRank, Place
from peftkit.deltas.merge import MergeSettings, merge
from peftkit.errors import DeltaError
from peftkit.release.export import gguf_kept
from peftkit.release.export.gguf_kept import kept_in
from peftkit.release.export.gguf_model import write_model_gguf

FLOAT32 = MergeSettings(onto="original", dtype="float32")
LAYER = "model.layers.1."
MATRICES = [f"{LAYER}{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
NORM, BIAS = f"{LAYER}input_layernorm.weight", f"{LAYER}self_attn.k_proj.bias"


def adapter(base: dict[str, np.ndarray], size: float) -> Deltas:
    """LoRA whose entries are about `size`, a norm that moves by 0.3, and a bias by as much as there is one."""
    random = torch.Generator().manual_seed(7)
    changes: dict[str, Any] = {}
    for name in MATRICES:
        rows, columns = base[name].shape
        left, right = torch.randn(rows, 4, generator=random), torch.randn(4, columns, generator=random)
        changes[name] = LowRank((rows, columns), left, right, size / 2)
    for name in (NORM, BIAS):
        if name in base:
            shape = base[name].shape
            changes[name] = Added(shape, 0.3 * torch.randn(1, *shape, generator=random))
    return Deltas("a@1", changes, {name: Place(name.rpartition(".")[0], "linear") for name in changes})


def dense(delta: Any) -> np.ndarray:
    if isinstance(delta, LowRank):
        return delta.scale * delta.left.double().numpy() @ delta.right.double().numpy()
    return delta.values.double().numpy().reshape(delta.shape)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers as the type holds them; q8_0 after ggml-quants.c, quantize_row_q8_0_ref."""
    if dtype == "f32":
        return values.astype(np.float64)
    if dtype in ("f16", "bf16"):
        kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        return torch.from_numpy(values).to(kind).double().numpy()
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = blocks * (np.float32(1) / scale)
    codes = np.sign(codes) * np.floor(np.abs(codes) + np.float32(0.5))
    return (codes.astype(np.float64) * scale.astype(np.float16).astype(np.float64)).reshape(values.shape)


def figures(base: np.ndarray, delta: np.ndarray, dtype: str, offset: float) -> tuple[float, float, int]:
    """Share, noise and unchanged entries. Rows and heads may stand in any order: no sum depends on it."""
    stored = [each.astype(np.float32) + np.float32(offset) for each in (base.astype(np.float64) + delta, base)]
    found, alone = (encode(each, dtype) for each in stored)
    moved, length = found - alone, float((delta**2).sum())
    share = float((moved * delta).sum()) / length
    return share, float((((moved - delta) ** 2).sum() / length) ** 0.5), int((found == alone).sum())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "bf16"), ("llama", "q8_0"), ("llama", "f32"), ("gemma2", "f16"), ("gemma2", "q8_0")]
)
def test_shares_are_those_of_the_numbers_in_the_file(
    kind: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path / "base", kind, **({"attention_bias": True} if kind == "llama" else {}))
    base = load_file(tmp_path / "base" / "model.safetensors")
    deltas = adapter(base, 2e-4)
    assert (BIAS in deltas.changes) == (kind == "llama")
    merge(tmp_path / "base", deltas, tmp_path / "merged", FLOAT32)
    path = write_model_gguf(tmp_path / "merged", tmp_path / "m.gguf", dtype).path
    monkeypatch.setattr(gguf_kept, "_STEP", 1500)  # pieces that end within a tensor
    kept = kept_in(path, dtype, tmp_path / "base", deltas, FLOAT32)
    assert kept.tensors.keys() == deltas.changes.keys()
    for name, delta in deltas.changes.items():
        vector = len(base[name].shape) < 2
        offset = 1.0 if name == NORM and kind == "gemma2" else 0.0
        share, noise, unchanged = figures(base[name], dense(delta), "f32" if vector else dtype, offset)
        found = kept.tensors[name]
        assert found.share == pytest.approx(share, rel=1e-9), name
        assert found.relative_noise == pytest.approx(noise, rel=1e-6, abs=1e-9), name
        assert (found.unchanged, found.entries) == (unchanged, base[name].size), name
    assert kept.groups.keys() == {f"LoRA in {dtype}", "values in f32"}


def test_the_base_of_a_merge_onto_dequantized_weights_is_dequantized(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    write_family(tmp_path / "base", "qwen2", intermediate_size=128)
    base = load_file(tmp_path / "base" / "model.safetensors")
    deltas, settings = adapter(base, 2e-4), MergeSettings(onto="dequantized", dtype="float32")
    nf4 = {"bits": 4, "quant_type": "nf4", "compute_dtype": "float32"}
    merge(tmp_path / "base", deltas, tmp_path / "merged", settings, trained_on=nf4)
    path = write_model_gguf(tmp_path / "merged", tmp_path / "m.gguf", "bf16").path
    kept = kept_in(path, "bf16", tmp_path / "base", deltas, settings, trained_on=nf4)
    for name in MATRICES:
        weight = torch.from_numpy(base[name])
        held = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=False)).float().numpy()
        share, noise, unchanged = figures(held, dense(deltas.changes[name]), "bf16", 0.0)
        found = kept.tensors[name]
        assert found.share == pytest.approx(share, rel=1e-9)
        assert found.relative_noise == pytest.approx(noise, rel=1e-6)
        assert found.unchanged == unchanged


def test_a_tensor_that_the_file_does_not_hold_so_is_an_error(tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama")
    base = load_file(tmp_path / "base" / "model.safetensors")
    path = write_model_gguf(tmp_path / "base", tmp_path / "m.gguf", "f32").path
    (tmp_path / "other").mkdir()
    write_family(tmp_path / "other", "llama", intermediate_size=64)
    grown = adapter(load_file(tmp_path / "other" / "model.safetensors"), 1.0)
    with pytest.raises(DeltaError, match=r"does not hold model\.layers\.1\.mlp\.down_proj\.weight in the shape"):
        kept_in(path, "f32", tmp_path / "other", grown, FLOAT32)
    # A file without the delta in it keeps nothing of it.
    lost = kept_in(path, "f32", tmp_path / "base", adapter(base, 1.0), FLOAT32).lost()
    assert lost is not None
    assert "keeps 0.0 % of the delta" in lost.fact


@pytest.fixture(scope="module")
def faint(biased_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Export of an adapter over bfloat16 weights: a LoRA far below their steps, and a norm that moves a lot."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from peftkit.base.identity import identify
    from peftkit.base.places import remember_place
    from peftkit.registry import Registry
    from peftkit.registry.exchange import ImportBase, import_adapter
    from peftkit.release.export.entry import ExportOptions, export_for

    folder = tmp_path_factory.mktemp("faint")
    base, cache = folder / "base", folder / "cache"
    base.mkdir()
    for path in biased_base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load(base / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    size = {"A": 1.0, "B": 5e-6}.get(name.partition("lora_")[2][:1], 0.2)
                    parameter.copy_(size * torch.randn(parameter.shape))
    model.save_pretrained(str(folder / "saved"))
    identity, store = identify(base, cache), Registry(folder / "adapters")
    remember_place(identity, str(base), cache)
    import_adapter(store, folder / "saved", name="faint", base=ImportBase(identity.record, base.name, None, None))

    def export(out: Path, engine: str = "gguf", report: Any = lambda _: None, **options: Any) -> Any:
        given = ExportOptions(merged=True, **options)
        return export_for(engine, store, ["faint"], out, cache, options=given, report=report)

    return export


@pytest.mark.parametrize("engine", ["gguf", "ollama"])
def test_a_delta_that_the_file_rounds_away_is_refused(engine: str, faint: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DeltaError) as caught:
        faint(tmp_path / "out", engine)
    assert "% of the delta (LoRA in bf16)" in caught.value.fact
    assert "_proj.weight" in caught.value.fact
    assert "--dtype float16 or float32" in str(caught.value.hint)
    assert "--force" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_force_writes_it_and_says_so(faint: Callable[..., Any], tmp_path: Path) -> None:
    from peftkit.events import Event, Warned

    events: list[Event] = []
    receipt = faint(tmp_path / "out", force=True, report=events.append)
    (each,) = receipt.versions.values()
    assert each == json.loads((tmp_path / "out" / "peftkit_export.json").read_text())
    written = each["written"]
    assert (written["forced"], written["dtype"]) == (True, "bf16")
    # The norm alone is nearly all of the delta: the overall share does not show what was lost.
    assert written["weights"]["kept"] > 0.99
    assert written["groups"]["LoRA in bf16"]["kept"] < 0.5
    assert any("because of --force" in event.text for event in events if isinstance(event, Warned))


def test_a_finer_type_keeps_it(faint: Callable[..., Any], tmp_path: Path) -> None:
    receipt = faint(tmp_path / "out", dtype="float32")
    (each,) = receipt.versions.values()
    assert each["written"]["forced"] is False
    assert each["written"]["groups"]["LoRA in f32"]["kept"] == pytest.approx(1, abs=1e-4)
