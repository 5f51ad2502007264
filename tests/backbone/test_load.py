"""Loading: dtypes as asked, already quantized uploads taken over or refused, and nothing downloaded is executed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import write_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from peftkit.backbone.bnb import Linear4bit, Linear8bitLt
from peftkit.backbone.contain import base_tensors, quantized_linears
from peftkit.backbone.load import load_backbone
from peftkit.backbone.quantize import footprint
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import BackboneError, BaseError, PeftkitError


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny base with some keys of config.json replaced."""

    def copy(name: str = "copy", **config: Any) -> Path:
        folder = Path(shutil.copytree(tiny_base, tmp_path / name))
        return edit(folder, **config)

    return copy


def edit(folder: Path, file: str = "config.json", **settings: Any) -> Path:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **settings}))
    return folder


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_is_not_quantized_has_the_dtype_asked_for(load: Callable[..., Any], bits: int) -> None:
    backbone = load(bits=bits, dtype="bfloat16")
    model, quantized = backbone.model, quantized_linears(backbone.model)
    plain = {
        name: parameter for name, parameter in model.named_parameters() if name.removesuffix(".weight") not in quantized
    }
    assert len(quantized) == (0 if bits == 16 else 14)
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= set(plain)
    assert {parameter.dtype for parameter in plain.values()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    measured = footprint(model)
    assert measured.other_bytes == 2 * measured.other_parameters


@pytest.mark.parametrize(("bits", "kind"), [(4, Linear4bit), (8, Linear8bitLt)])
def test_all_linear_layers_but_the_head_are_quantized(load: Callable[..., Any], bits: int, kind: type) -> None:
    model = load(bits=bits).model
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linear if not isinstance(model.get_submodule(name), kind)} == {"lm_head"}


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_everything_is_frozen_and_evaluating(load: Callable[..., Any], bits: int) -> None:
    model = load(bits=bits).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_the_record_names_the_quantization(load: Callable[..., Any]) -> None:
    assert load(bits=4).quantization_record() == {
        "bits": 4,
        "compute_dtype": "float32",
        "label": "nf4+dq",
        "quant_type": "nf4",
        "double_quant": True,
    }
    assert load(bits=8).quantization_record() == {"bits": 8, "compute_dtype": "float32", "label": "int8"}


@pytest.fixture
def uploaded(load: Callable[..., Any], tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """An upload that was quantized by bitsandbytes, as the Hub's `*-bnb-4bit` are."""

    def uploaded(**quant: Any) -> Path:
        backbone = load(**quant)
        folder = tmp_path / ("upload-" + backbone.quant.label)
        backbone.model.save_pretrained(str(folder))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (tiny_base / name).exists():
                shutil.copy(tiny_base / name, folder)
        return folder

    return uploaded


@pytest.mark.parametrize(
    ("quant", "label"),
    [({"quant_type": "fp4", "double_quant": False}, "fp4"), ({"double_quant": True}, "nf4+dq"), ({"bits": 8}, "int8")],
)
def test_a_quantized_upload_keeps_its_own_settings(
    load: Callable[..., Any], uploaded: Callable[..., Path], quant: dict[str, Any], label: str
) -> None:
    folder = uploaded(**quant)
    again = load(folder, bits=quant.get("bits", 4))
    assert again.quant.label == label
    assert again.quantization_record()["label"] == label
    before, after = base_tensors(load(**quant).model), base_tensors(again.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_quantized_upload_computes_as_this_machine_decided(
    load: Callable[..., Any], uploaded: Callable[..., Path]
) -> None:
    """Uploads say float16 or bfloat16; what is printed and recorded must be what the layers do."""
    folder = uploaded(bits=4)
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config={**stored, "bnb_4bit_compute_dtype": "float16"})
    backbone = load(folder)
    dtypes = {layer.compute_dtype for layer in quantized_linears(backbone.model).values()}
    assert dtypes == {backbone.placement.compute_dtype}


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_quantizations_are_refused_by_name(
    load: Callable[..., Any], copy: Callable[..., Path], method: str
) -> None:
    with pytest.raises(BackboneError, match=f"quantized with {method}"):
        load(copy(quantization_config={"quant_method": method, "bits": 4}))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_other_bits_than_the_upload_are_refused(
    load: Callable[..., Any], uploaded: Callable[..., Path], bits: int
) -> None:
    with pytest.raises(BackboneError, match=f"stored in 4 bits, but quant.bits={bits}"):
        load(uploaded(bits=4), bits=bits)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


def evil(folder: Path) -> Path:
    (folder / "modeling_evil.py").write_text(EVIL)
    (folder / "tokenization_evil.py").write_text(EVIL)
    return folder


def test_an_unknown_architecture_with_own_code_is_refused(load: Callable[..., Any], copy: Callable[..., Path]) -> None:
    code = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    folder = evil(copy(model_type="evil-llm", architectures=["Evil"], auto_map=code))
    with pytest.raises(BackboneError, match=r"evil-llm.*brings its own code"):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_known_architecture_with_own_code_uses_ours(load: Callable[..., Any], copy: Callable[..., Path]) -> None:
    code = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    folder = evil(copy(auto_map=code))
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]})
    assert type(load(folder).model).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()
    assert not any("evil" in name for name in sys.modules)


def test_an_unknown_architecture_is_refused(load: Callable[..., Any], copy: Callable[..., Path]) -> None:
    with pytest.raises(BackboneError, match="'llama-99'") as caught:
        load(copy(model_type="llama-99"))
    assert "upgrade transformers" in str(caught.value)


def test_a_pickle_is_refused(load: Callable[..., Any], copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(BaseError, match=r"pytorch_model\.bin.*run code"):
        load(folder)
    assert not (folder / "ran").exists()


def test_safetensors_are_taken_where_a_pickle_lies_beside_them(
    load: Callable[..., Any], copy: Callable[..., Path]
) -> None:
    folder = copy()
    (folder / "pytorch_model.bin").write_bytes(b"not a model")
    assert load(folder).model is not None


@pytest.mark.parametrize("damage", ["truncated", "no config", "no tokenizer", "no tensors of a layer"])
def test_a_broken_folder_is_an_error_that_says_so(
    load: Callable[..., Any], copy: Callable[..., Path], damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy()
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        kept = {name: tensor for name, tensor in load_file(weights).items() if "layers.1.mlp" not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(PeftkitError):
        load(folder)


def test_an_attention_kernel_that_is_not_there(load: Callable[..., Any]) -> None:
    with pytest.raises(BackboneError):
        load(attention="flash_attention_2", device="cpu")


def test_the_same_base_loads_bitwise_the_same(load: Callable[..., Any]) -> None:
    first, second = base_tensors(load(bits=4).model), base_tensors(load(bits=4).model)
    assert len(first) > 14
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_a_fused_kernel_is_loaded_eager(tmp_path: Path) -> None:
    """transformers refuses sdpa for Gemma-2, whose scores are capped; nobody asked for a kernel here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=512, num_key_value_heads=1, head_dim=64, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    write_tokenizer(tmp_path / "gemma2")
    said: list[Any] = []
    backbone = load_backbone(
        BaseSpec(source=str(tmp_path / "gemma2")), QuantSpec(bits=4), tmp_path / "cache", report=said.append
    )
    assert backbone.model.config._attn_implementation == "eager"
    assert [event.choice for event in said if getattr(event, "what", "") == "attention"] == ["eager"]
    with pytest.raises(BackboneError, match="scaled_dot_product_attention"):
        asked = QuantSpec(bits=4, attention="sdpa")
        load_backbone(BaseSpec(source=str(tmp_path / "gemma2")), asked, tmp_path / "cache")
