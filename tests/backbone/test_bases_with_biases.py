"""A base with biases (Qwen2): quantized layers must not convert them on the way, whatever the dtypes are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_bases import write_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from peftkit.backbone.contain import base_tensors
from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, longest_sequence


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, eos_token_id=2, pad_token_id=2)  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    model.save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_forward_changes_a_bias(qwen: Path, tmp_path: Path, bits: int, dtype: str) -> None:
    quant = QuantSpec.model_validate({"bits": bits, "compute_dtype": "bfloat16", "dtype": dtype, "device": "cpu"})
    model = load_backbone(BaseSpec(source=str(qwen)), quant, tmp_path).model
    before = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    assert any(name.endswith("bias") for name in before)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.tensor([[1, 2, 3]]))
    after = base_tensors(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
        assert not after[name].is_inference(), name


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 32768}}, 32768),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_how_much_a_base_can_read(config: dict[str, object], longest: int | None) -> None:
    assert longest_sequence(config) == longest
