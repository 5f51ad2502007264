"""One adapter of every variant that has a ΔW, with random tensors, on tiny bases of several architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

_TEXT = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA = {**_TEXT, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_LLAMA["num_key_value_heads"] = 1
_GPT2 = {**_TEXT, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
_GPT_OSS = {
    **_LLAMA,
    "intermediate_size": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "sliding_window": 16,
}
_LLAMA4 = {**_LLAMA, "intermediate_size_mlp": 24, "num_local_experts": 3, "head_dim": 8, "interleave_moe_layer_step": 1}
_RESNET = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 5}
_RESNET |= {"layer_type": "bottleneck", "reduction_factor": 2}

BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=False)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**_GPT_OSS)),
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**_LLAMA4)),
    "resnet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**_RESNET)),
}


@dataclass(frozen=True)
class Variant:
    """One method with its settings on one base; `grown` rows are added to its vocabulary first."""

    name: str
    base: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    grown: int = 0
    keep_embeddings: bool = False


def write_base(folder: Path, name: str) -> Any:
    """Write a base with random numbers, norms and biases included, and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = BASES[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder))
    return model


def write_adapter(variant: Variant, base: Any, folder: Path) -> None:
    """Write what PEFT saves of the variant, all that it trains moved at random."""
    model = copy.deepcopy(base)
    if variant.grown:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model.resize_token_embeddings(model.config.vocab_size + variant.grown, mean_resizing=False)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[variant.method](**copy.deepcopy(variant.settings))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape)
    tuned.eval().save_pretrained(str(folder), save_embedding_layers=bool(variant.grown or variant.keep_embeddings))


def attached(variant: Variant, base: Any, folder: Path) -> Any:
    """What PEFT makes of the saved adapter."""
    model = copy.deepcopy(base)
    if variant.grown:
        model.resize_token_embeddings(model.config.vocab_size + variant.grown, mean_resizing=False)
    with torch.random.fork_rng():
        return PeftModel.from_pretrained(model, str(folder)).eval()


def inputs(variant: Variant) -> dict[str, torch.Tensor]:
    """Something to run the base on: every token, or a picture."""
    if variant.base == "resnet":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).sin().reshape(1, 3, 32, 32)}
    return {"input_ids": torch.arange(40 + variant.grown).reshape(-1, 20 + variant.grown // 2)}


_ATTENTION = ["q_proj", "v_proj", "down_proj"]
_BOTH = ["q_proj", "o_proj"]
_CONV1D = ["c_attn", "c_proj", "c_fc"]
_CONVS = ["convolution"]


def _lora(name: str, base: str, targets: Any, **settings: Any) -> Variant:
    grown = settings.pop("grown", 0)
    keep = settings.pop("keep_embeddings", False)
    return Variant(name, base, "LORA", {"r": 3, "lora_alpha": 5, "target_modules": targets, **settings}, grown, keep)


VARIANTS = (
    _lora("lora", "llama", _ATTENTION),
    _lora("rslora", "llama", _ATTENTION, use_rslora=True),
    _lora(
        *("patterns", "llama", _ATTENTION),
        rank_pattern={"q_proj": 2, "^model.layers.0.self_attn.v_proj": 4},
        alpha_pattern={"down_proj": 7, "layers.0.self_attn.v_proj": 9},
    ),
    _lora("rslora-patterns", "llama", _ATTENTION, use_rslora=True, rank_pattern={"q_proj": 2}),
    _lora("lora-bias", "qwen2", ["q_proj", "v_proj"], lora_bias=True),
    _lora("trained-biases", "qwen2", ["q_proj", "o_proj"], bias="all"),
    _lora("targets-biases", "qwen2", ["q_proj"], bias="lora_only"),
    _lora("dora", "llama", _ATTENTION, use_dora=True),
    _lora("dora-rslora", "qwen2", _ATTENTION, use_dora=True, use_rslora=True),
    _lora("dora-embedding", "llama", ["embed_tokens"], use_dora=True),
    _lora("conv1d", "gpt2", _CONV1D),
    _lora("conv1d-dora", "gpt2", _CONV1D, use_dora=True),
    _lora("conv1d-bias", "gpt2", ["c_proj"], lora_bias=True),
    _lora("gpt2-head", "gpt2", ["lm_head", "c_proj"]),
    _lora("embedding", "llama", ["embed_tokens", "q_proj"]),
    _lora("embedding-kept", "llama", ["embed_tokens", "q_proj"], keep_embeddings=True),
    _lora("head", "llama", ["lm_head"]),
    _lora("tied-head", "tied", ["lm_head", "q_proj"]),
    _lora("tied-embedding", "tied", ["embed_tokens", "q_proj"]),
    _lora("tied-embedding-kept", "tied", ["embed_tokens", "q_proj"], keep_embeddings=True),
    _lora("tied-both", "tied", ["embed_tokens", "lm_head"]),
    _lora("tied-together", "tied", ["embed_tokens"], ensure_weight_tying=True),
    _lora("saved-embedding", "llama", ["q_proj"], modules_to_save=["embed_tokens"]),
    _lora("saved-norms", "llama", ["q_proj"], modules_to_save=["norm"]),
    _lora("saved-layer", "qwen2", ["o_proj"], modules_to_save=["q_proj"]),
    _lora("saved-mlp", "llama", ["q_proj"], modules_to_save=["mlp"]),
    _lora("tied-saved-embedding", "tied", ["q_proj"], modules_to_save=["embed_tokens"]),
    _lora("tied-saved-head", "tied", ["q_proj"], modules_to_save=["lm_head"]),
    _lora("tied-saved-both", "tied", ["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    _lora("tied-saved-together", "tied", ["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    _lora("tokens", "llama", ["q_proj"], trainable_token_indices=[7, 3]),
    _lora("tied-tokens", "tied", ["q_proj"], trainable_token_indices=[7, 3]),
    _lora("tied-tokens-apart", "tied", ["q_proj"], trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [3, 9]}),
    _lora("tied-tokens-head", "tied", ["q_proj"], trainable_token_indices={"lm_head": [3, 9]}),
    _lora("grown", "llama", ["q_proj"], grown=4),
    _lora("tied-grown", "tied", ["q_proj"], grown=4),
    _lora("tied-grown-embedding", "tied", ["q_proj", "embed_tokens"], grown=4),
    _lora("tied-grown-head", "tied", ["q_proj", "lm_head"], grown=4),
    _lora("convolutions", "resnet", _CONVS),
    _lora("convolutions-dora", "resnet", _CONVS, use_dora=True),
    _lora("experts", "gpt_oss", ["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    _lora("experts-one", "gpt_oss", [], target_parameters=["experts.down_proj"], rank_pattern={"down_proj": 2}),
    _lora(
        *("experts-untransposed", "llama4", ["q_proj"]),
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "router.weight"],
    ),
    Variant("adalora", "llama", "ADALORA", {"target_modules": _ATTENTION, "total_step": 10, "init_r": 4}),
    Variant(
        *("adalora-alpha", "gpt2", "ADALORA"),
        {"target_modules": _CONV1D, "total_step": 10, "init_r": 4, "lora_alpha": 12},
    ),
    Variant(
        *("adalora-pruned", "llama", "ADALORA"),
        {
            "target_modules": _BOTH,
            "total_step": 10,
            "init_r": 4,
            "lora_alpha": 6,
            "rank_pattern": {
                "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True],
                "model.layers.0.self_attn.o_proj.lora_E": [False, False, False, False],
            },
        },
    ),
    Variant("loha", "llama", "LOHA", {"r": 3, "alpha": 5, "target_modules": _ATTENTION}),
    Variant("loha-patterns", "llama", "LOHA", {"r": 3, "target_modules": _BOTH, "alpha_pattern": {"q_proj": 3}}),
    Variant("loha-convolutions", "resnet", "LOHA", {"r": 3, "alpha": 5, "target_modules": _CONVS}),
    Variant(
        "loha-effective", "resnet", "LOHA", {"r": 3, "alpha": 5, "target_modules": _CONVS, "use_effective_conv2d": True}
    ),
    Variant("lokr", "llama", "LOKR", {"r": 2, "alpha": 5, "target_modules": _ATTENTION}),
    Variant("lokr-whole", "llama", "LOKR", {"r": 30, "alpha": 5, "target_modules": _ATTENTION}),
    Variant(
        *("lokr-both", "llama", "LOKR"),
        {"r": 1, "alpha": 5, "target_modules": _ATTENTION, "decompose_both": True, "decompose_factor": 4},
    ),
    Variant("lokr-convolutions", "resnet", "LOKR", {"r": 1, "alpha": 5, "target_modules": _CONVS}),
    Variant(
        "lokr-effective", "resnet", "LOKR", {"r": 1, "alpha": 5, "target_modules": _CONVS, "use_effective_conv2d": True}
    ),
    Variant("ia3", "llama", "IA3", {"target_modules": _ATTENTION, "feedforward_modules": ["down_proj"]}),
    Variant("ia3-biases", "qwen2", "IA3", {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": []}),
    Variant("ia3-conv1d", "gpt2", "IA3", {"target_modules": _CONV1D, "feedforward_modules": ["c_proj"]}),
    Variant("ia3-convolutions", "resnet", "IA3", {"target_modules": _CONVS, "feedforward_modules": []}),
    Variant("ia3-channels", "resnet", "IA3", {"target_modules": _CONVS, "feedforward_modules": _CONVS}),
    Variant("vera", "llama", "VERA", {"r": 3, "target_modules": _BOTH}),
    Variant("vera-conv1d", "gpt2", "VERA", {"r": 3, "target_modules": ["c_attn", "c_fc"]}),
    Variant("oft", "llama", "OFT", {"r": 0, "oft_block_size": 4, "target_modules": _ATTENTION}),
    Variant("oft-terms", "llama", "OFT", {"r": 2, "oft_block_size": 0, "target_modules": _BOTH}),
    Variant(
        *("oft-exact", "qwen2", "OFT"),
        {"r": 0, "oft_block_size": 4, "target_modules": _ATTENTION, "use_cayley_neumann": False},
    ),
    Variant(
        *("oft-shared", "llama", "OFT"),
        {"r": 0, "oft_block_size": 4, "target_modules": _ATTENTION, "block_share": True},
    ),
    Variant(
        *("oft-constrained", "llama", "OFT"),
        {"r": 0, "oft_block_size": 4, "target_modules": _ATTENTION, "coft": True, "eps": 0.5},
    ),
    Variant("oft-embedding", "llama", "OFT", {"r": 0, "oft_block_size": 4, "target_modules": ["embed_tokens"]}),
    Variant(
        "oft-convolutions", "resnet", "OFT", {"r": 0, "oft_block_size": 2, "target_modules": ["shortcut.convolution"]}
    ),
    Variant("trainable-tokens", "llama", "TRAINABLE_TOKENS", {"token_indices": [7, 3]}),
    Variant("tied-trainable-tokens", "tied", "TRAINABLE_TOKENS", {"token_indices": [7, 3]}),
    Variant("ln-tuning", "gpt2", "LN_TUNING", {"target_modules": ["ln_1"]}),
    Variant("beft", "qwen2", "BEFT", {"target_modules": ["q_proj"]}),
    Variant("hira", "llama", "HIRA", {"r": 3, "target_modules": _ATTENTION}),
    Variant("hira-conv1d", "gpt2", "HIRA", {"r": 3, "target_modules": _CONV1D}),
    Variant("miss", "llama", "MISS", {"r": 5, "target_modules": _ATTENTION}),
    Variant("miss-mini", "llama", "MISS", {"r": 4, "mini_r": 4, "target_modules": _BOTH, "init_weights": "mini"}),
    Variant("delora", "llama", "DELORA", {"r": 3, "target_modules": _ATTENTION}),
)
