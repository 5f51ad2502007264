"""Every parameter has one depth, counted by hand for each architecture: embeddings, blocks, head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from tiny_families import _SHAPE, FAMILIES
from torch import nn

from peftkit.tuning.depth import decays, depths, find_blocks

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}


def build(name: str, **settings: Any) -> Any:
    made = getattr(transformers, name)
    return made(made.config_class(**settings))


FINAL_NORM, TOKENS = {"model.norm.weight"}, {"model.embed_tokens.weight"}
BERT = {f"bert.embeddings.{name}" for name in (
    "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight",
    "LayerNorm.bias",
)}  # fmt: skip
HEAD_OF_BERT = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
MLM = {f"cls.predictions.{name}" for name in (
    "bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight", "transform.LayerNorm.bias",
    "decoder.bias",
)}  # fmt: skip
OPT_NORM = {f"model.decoder.final_layer_norm.{name}" for name in ("weight", "bias")}
BLOOM_NORM = {f"transformer.word_embeddings_layernorm.{name}" for name in ("weight", "bias")}
GPT2_NORM = {"transformer.ln_f.weight", "transformer.ln_f.bias"}
VIT = {"cls_token", "position_embeddings", "patch_embeddings.projection.weight", "patch_embeddings.projection.bias"}
STEM = {"convolution.weight", "normalization.weight", "normalization.bias"}

# Model, path of the blocks, depth 0, depth L + 1, parameters in each block; worked out from the modelling files.
CASES: dict[str, tuple[Callable[[], Any], str, set[str], set[str], int]] = {
    "llama": (lambda: build("LlamaForCausalLM", **SIZES, tie_word_embeddings=False), "model.layers", TOKENS,
              FINAL_NORM | {"lm_head.weight"}, 9),
    "llama, tied": (lambda: build("LlamaForCausalLM", **SIZES, tie_word_embeddings=True), "model.layers",
                    TOKENS | {"lm_head.weight"}, FINAL_NORM, 9),
    "qwen2": (lambda: build("Qwen2ForCausalLM", **SIZES, num_key_value_heads=1, tie_word_embeddings=True),
              "model.layers", TOKENS | {"lm_head.weight"}, FINAL_NORM, 12),
    "gemma2": (lambda: build("Gemma2ForCausalLM", **SIZES, num_key_value_heads=1, head_dim=32), "model.layers",
               TOKENS | {"lm_head.weight"}, FINAL_NORM, 11),
    "mixtral": (lambda: build("MixtralForCausalLM", **SIZES, num_key_value_heads=1, num_local_experts=4),
                "model.layers", TOKENS, FINAL_NORM | {"lm_head.weight"}, 9),
    "gpt2": (lambda: build("GPT2LMHeadModel", **GPT2), "transformer.h",
             {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}, GPT2_NORM, 12),
    "opt": (lambda: build("OPTForCausalLM", **{**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 64}),
            "model.decoder.layers",
            {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "lm_head.weight"},
            OPT_NORM, 16),
    "bloom": (lambda: build("BloomForCausalLM", hidden_size=64, n_layer=2, n_head=2, vocab_size=100),
              "transformer.h", {"transformer.word_embeddings.weight", "lm_head.weight"} | BLOOM_NORM, GPT2_NORM, 12),
    "bert": (lambda: build("BertForSequenceClassification", **SIZES), "bert.encoder.layer", BERT, HEAD_OF_BERT, 16),
    "bert, masked": (lambda: build("BertForMaskedLM", **SIZES), "bert.encoder.layer",
                     BERT | {"cls.predictions.decoder.weight"}, MLM, 16),
    "vit": (lambda: build("ViTForImageClassification", **{k: v for k, v in SIZES.items() if "_token" not in k},
                          image_size=32), "vit.layers", {f"vit.embeddings.{name}" for name in VIT},
            {"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"}, 16),
    "resnet": (lambda: build("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
               "resnet.encoder.stages", {f"resnet.embedder.embedder.{name}" for name in STEM},
               {"classifier.1.weight", "classifier.1.bias"}, 9),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    make, path, embeddings, head, in_a_block = CASES[case]
    model = make()
    found = depths(model)
    assert (found.path, found.top, len(found.blocks)) == (path, 3, 2)
    assert {name for name, depth in found.of.items() if depth == 0} == embeddings
    assert {name for name, depth in found.of.items() if depth == 3} == head
    for name, depth in found.of.items():
        if depth in (1, 2):
            assert name.startswith(f"{path}.{depth - 1}.")
    assert Counter(found.of.values())[1] == in_a_block
    assert found.of.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert list(found.blocks) == list(model.get_submodule(path))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_of_every_family_has_one_depth(kind: str) -> None:
    name, settings = FAMILIES[kind]
    model = build(name, **{**_SHAPE, **settings})
    found = depths(model)
    assert set(found.of.values()) == {0, 1, 2, 3}
    by_tensor: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), set()).add(found.of[name])
        # The names are those of transformers' decoders, and the code above reads none of them.
        layer = re.search(r"\.layers\.(\d+)\.", name)
        assert layer is None or found.of[name] == int(layer[1]) + 1
        assert (found.of[name] == 0) == (parameter is model.get_input_embeddings().weight)
    assert all(len(depth) == 1 for depth in by_tensor.values())
    assert len(by_tensor) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), {1: 14, 2: 14}),
        (LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], task_type="CAUSAL_LM"),
         {0: 2, 1: 2, 2: 2, 3: 2}),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
         {1: 2, 2: 2, 3: 1}),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
         {1: 2, 2: 2}),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {0: 1}),
        (TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5], task_type="CAUSAL_LM"), {0: 1}),
    ],
)  # fmt: skip
def test_an_adapter_lies_where_it_hangs(config: Any, where: dict[int, int]) -> None:
    model = get_peft_model(build("LlamaForCausalLM", **SIZES, tie_word_embeddings=False), config)
    found = depths(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert Counter(found.of[name] for name in trained) == where
    assert found.top == 3
    assert list(model.get_submodule(found.path)) == list(found.blocks)


def test_labels_count_blocks_from_zero() -> None:
    found = depths(build("GPT2LMHeadModel", **GPT2))
    assert [found.label(depth) for depth in range(4)] == ["embeddings", "block 0", "block 1", "head"]


def test_a_model_without_blocks_is_all_head() -> None:
    found = depths(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    assert (found.path, found.blocks, found.top, set(found.of.values())) == ("", (), 1, {1})


class WithExperts(nn.Module):
    """Two blocks of eight experts each, and a longer list beside the blocks that holds less."""

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=layers)
        self.small = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
        experts = [nn.ModuleList(nn.Linear(4, 4) for _ in range(8)) for _ in range(2)]
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": own}) for own in experts)


@pytest.mark.parametrize("layers", [2, 8, None])
def test_blocks_are_not_the_longest_list(layers: int | None) -> None:
    model = WithExperts(layers)
    assert len(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)) == 20  # the old rule
    assert find_blocks(model)[0] == "layers"


def test_the_configured_number_of_blocks_decides() -> None:
    assert find_blocks(WithExperts(20))[0] == "small"


def test_decay_is_for_matrices() -> None:
    for case in ("llama", "gpt2", "bert", "resnet"):
        model = CASES[case][0]()
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim > 1
            assert decays(name, modules[name.rpartition(".")[0]], parameter) == matrix, name
    wide = nn.LayerNorm((2, 3))
    assert not decays("norm.weight", wide, wide.weight)
    assert not decays("x.bias", nn.Identity(), torch.zeros(2, 2))
    assert not decays("x.ia3_l.default", nn.Identity(), torch.ones(1, 8))
    assert decays("x.lora_A.default.weight", nn.Linear(8, 1), torch.ones(1, 8))
