"""Counts from config.json alone against the real modules on the meta device, and against published counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peftkit.errors import BaseError
from peftkit.planning.architecture import Architecture, architecture
from peftkit.planning.families import FAMILIES

MODELS = json.loads((Path(__file__).parents[2] / "benchmarks" / "published_memory.json").read_text())["models"]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 64, "num_key_value_heads": 4}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 1024}),
    ("falcon", {"bias": True, "parallel_attn": False, "multi_query": False, "num_attention_heads": 64,
                "hidden_size": 1024}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("opt", {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16,
             "do_layer_norm_before": False}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    ("phi", {"qk_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
]  # fmt: skip


def on_meta(name: str, changes: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The config of a three-layer model of a family, and its modules without weights."""
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = CONFIG_MAPPING[name](**{layers: 3, **changes})
    with torch.device("meta"):
        return config.to_dict(), AutoModelForCausalLM.from_config(config)


def real_linears(model: Any) -> dict[str, tuple[int, int, int, bool]]:
    """Out, in, count and bias of every linear layer but the head, by name inside its block."""
    found: dict[str, tuple[int, int, int, bool]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            shape = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            name = re.sub(r"^.*\.\d+\.", "", path).removeprefix("model.decoder.")
            count = found[name][2] + 1 if name in found else 1
            found[name] = (shape[0], shape[1], count, module.bias is not None)
    return found


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(VARIANTS)])
def test_every_count_is_that_of_the_real_modules(name: str, changes: dict[str, Any]) -> None:
    config, model = on_meta(name, changes)
    shape = architecture(config)
    assert {each.name: (each.out, each.into, each.count, each.bias) for each in shape.linears} == real_linears(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    assert shape.tied == (head.weight is model.get_input_embeddings().weight)
    biases = sum(p.numel() for path, p in model.named_parameters() if path.endswith("bias") and "norm" not in path
                 and "ln_" not in path)  # fmt: skip
    assert shape.bias_parameters == biases


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("smollm2-135m", 134_515_008),
        ("smollm2-1.7b", 1_711_376_384),
        ("tinyllama-1.1b", 1_100_048_384),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("mistral-7b", 7_241_732_096),
        ("gemma-2b", 2_506_172_416),
        ("phi-1.5", 1_418_270_720),
    ],
)
def test_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert architecture(MODELS[name]).parameters == parameters


def test_linear_layers_of_the_embedded_base() -> None:
    shape = architecture(MODELS["smollm2-135m"])
    assert shape.linear_parameters == 106_168_320  # methods-and-oracles, section 2.2
    assert shape.adapter_parameters(8) == 8 * 30 * (2 * 1152 + 2 * 768 + 3 * 2112)


def test_targets_are_endings_of_names() -> None:
    shape = architecture(MODELS["llama-2-7b"])
    assert [each.name for each in shape.targets(("q_proj", "v_proj"))] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert shape.adapter_parameters(8, ("q_proj", "v_proj")) == 4_194_304  # LitGPT's resource table
    with pytest.raises(BaseError, match="query"):
        shape.targets(("query",))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = {name: value for name, value in MODELS["llama-2-7b"].items() if name != key}
    with pytest.raises(BaseError, match=key):
        architecture(config)


def test_an_unknown_model_type_is_refused_by_name() -> None:
    with pytest.raises(BaseError, match="mamba"):
        architecture({**MODELS["llama-2-7b"], "model_type": "mamba"})


def test_the_language_part_of_a_vision_model() -> None:
    inner = MODELS["gemma-2b"]
    assert architecture({"model_type": "some_vision_model", "text_config": inner}) == architecture(inner)


def test_older_configs_leave_out_what_was_usual() -> None:
    config = {key: value for key, value in MODELS["llama-2-7b"].items() if key != "num_key_value_heads"}
    assert architecture(config) == architecture(MODELS["llama-2-7b"])


def test_sliding_layers() -> None:
    def sliding(**keys: Any) -> tuple[int, int]:
        shape: Architecture = architecture({**MODELS["mistral-7b"], **keys})
        return shape.window, shape.sliding_layers

    assert sliding() == (0, 0)
    assert sliding(sliding_window=4096) == (4096, 32)
    assert sliding(sliding_window=512, layer_types=["full_attention"] * 31 + ["sliding_attention"]) == (512, 1)
