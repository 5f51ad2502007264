"""How the decoder blocks of each model type differ from Llama's: names, biases, norms; read off transformers 5.23."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Switch = bool | tuple[str, bool]
"""Yes, no, or the config key that says so and what its absence means."""


@dataclass(frozen=True)
class Names:
    """Paths of a decoder's modules, to which a tensor's name adds `.weight` or `.bias`. The defaults are Llama's."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    norm: str = "model.norm"
    head: str = "lm_head"
    norms: tuple[str, ...] = (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        "self_attn.q_norm", "self_attn.k_norm",
    )  # fmt: skip
    """Norms of a block; a family has some of them, those of queries and keys as the last two."""


@dataclass(frozen=True)
class Family:
    """One kind of decoder block. The defaults are Llama's."""

    tied: bool = False
    """Whether the head shares the embedding's weight where config.json does not say."""
    head_dim: int | None = None
    """Width of a head where config.json does not say; None: hidden size over heads."""
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three names, or the one of the fused projection."""
    output: str = "o_proj"
    mlp: str = "mlp"
    """Empty where the layers stand in the block itself (OPT)."""
    gate: tuple[str, ...] = ("gate_proj", "up_proj")
    """Two names, the one of the fused gate and up projection, or the one of a plain MLP's first layer."""
    gated: bool = True
    down: str = "down_proj"
    qkv_bias: Switch = ("attention_bias", False)
    output_bias: Switch = ("attention_bias", False)
    mlp_bias: Switch = ("mlp_bias", False)
    head_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_weights: int = 1
    """Vectors of a norm: 2 with a bias, 0 for OLMo's norm without parameters."""
    norms: int = 2
    """Norms of the hidden size in a block."""
    post_norms: bool = False
    """Norms stand (also) behind attention and MLP, before the residual sum."""
    qk_norm: Literal["head", "full"] | None = None
    """Norms on queries and keys, over one head or over all."""
    qk_norm_switch: Switch = True
    parallel: Switch = False
    """Attention and MLP read the same input, and one sum ends the block."""
    rotary: bool = True
    partial_rotary: bool = False
    """Turned and unturned parts of a head are put together in a new tensor, in another order of dimensions."""
    positions: int | None = None
    """Rows that the table of learned positions has beyond the longest sequence; None: no such table."""
    activation: str = "silu"
    """Where config.json does not name one."""
    scaled_embedding: bool = False
    """The model scales what the embedding gave; Gemma's embedding does it itself."""
    scaled_residual: bool = False
    experts: bool = False
    always_masked: bool = False
    """Every layer makes a mask, also where no row is padded (`allow_is_causal_skip=False`)."""
    quantizable: bool = True
    """Falcon's own linear class is not what transformers hands to bitsandbytes."""
    sliding: Literal["all", "alternate", "five_of_six"] | None = None
    """Layers that see only a window, where config.json names one and does not list its layers."""
    names: Names = Names()


_PER_HEAD = ("self_attn.q_layernorm.norms", "self_attn.k_layernorm.norms")  # lists of a norm for each head
_LLAMA = Family()
_GEMMA = Family(tied=True, head_dim=256, activation="gelu_pytorch_tanh")
_GPT2 = Family(
    tied=True, attention="attn", qkv=("c_attn",), output="c_proj", gate=("c_fc",), gated=False, down="c_proj",
    qkv_bias=True, output_bias=True, mlp_bias=True, norm="layer", norm_weights=2, rotary=False, positions=0,
    activation="gelu_new",
    names=Names("transformer.h", "transformer.wte", "transformer.wpe", "transformer.ln_f", norms=("ln_1", "ln_2")),
)  # fmt: skip
_NEOX = Family(
    attention="attention", qkv=("query_key_value",), output="dense", gate=("dense_h_to_4h",), gated=False,
    down="dense_4h_to_h", qkv_bias=("attention_bias", True), output_bias=("attention_bias", True), mlp_bias=True,
    norm="layer", norm_weights=2, parallel=("use_parallel_residual", True), activation="gelu", partial_rotary=True,
    names=Names("gpt_neox.layers", "gpt_neox.embed_in", norm="gpt_neox.final_layer_norm"),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, qkv_bias=False, output_bias=False, mlp_bias=False, sliding="all"),
    "smollm3": replace(_LLAMA, tied=True),
    "granite": replace(_LLAMA, scaled_embedding=True, scaled_residual=True),
    "qwen2": replace(_LLAMA, qkv_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": replace(_LLAMA, head_dim=128, mlp_bias=False, qk_norm="head"),
    "olmo": replace(_LLAMA, norm="layer", norm_weights=0, mlp_bias=False),
    "olmo2": replace(_LLAMA, post_norms=True, qk_norm="full", mlp_bias=False),
    "olmo3": replace(_LLAMA, post_norms=True, qk_norm="full", mlp_bias=False),
    "cohere": replace(
        _LLAMA, tied=True, norm="layer", norms=1, parallel=True, mlp_bias=False, qk_norm="head",
        qk_norm_switch=("use_qk_norm", False),
    ),
    "stablelm": replace(
        _LLAMA, qkv_bias=("use_qkv_bias", False), output_bias=False, mlp_bias=False, norm="layer", norm_weights=2,
        parallel=("use_parallel_residual", False), qk_norm="head", qk_norm_switch=("qk_layernorm", False),
        partial_rotary=True,
        names=Names(norms=("input_layernorm", "post_attention_layernorm", *_PER_HEAD)),
    ),
    "starcoder2": replace(
        _LLAMA, tied=True, gate=("c_fc",), gated=False, down="c_proj", qkv_bias=("use_bias", True),
        output_bias=("use_bias", True), mlp_bias=("use_bias", True), norm="layer", norm_weights=2,
        activation="gelu_pytorch_tanh",
    ),
    "phi": replace(
        _LLAMA, output="dense", gate=("fc1",), gated=False, down="fc2", qkv_bias=True, output_bias=True, mlp_bias=True,
        head_bias=True, norm="layer", norm_weights=2, norms=1, parallel=True, activation="gelu_new",
        qk_norm="head", qk_norm_switch=("qk_layernorm", False), partial_rotary=True,
        names=Names(
            norm="model.final_layernorm",
            norms=("input_layernorm", "", "self_attn.q_layernorm", "self_attn.k_layernorm"),
        ),
    ),
    "phi3": replace(
        _LLAMA, qkv=("qkv_proj",), gate=("gate_up_proj",), qkv_bias=False, output_bias=False, mlp_bias=False,
        sliding="all", partial_rotary=True,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4, post_norms=True, sliding="alternate"),
    "gemma3_text": replace(_GEMMA, norms=4, post_norms=True, qk_norm="head", sliding="five_of_six"),
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": replace(
        _GPT2, attention="self_attn", qkv=("q_proj", "k_proj", "v_proj"), output="out_proj", mlp="", gate=("fc1",),
        down="fc2", qkv_bias=("enable_bias", True), output_bias=("enable_bias", True), mlp_bias=("enable_bias", True),
        positions=2, activation="relu",
        names=Names(
            "model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.embed_positions",
            "model.decoder.final_layer_norm", norms=("self_attn_layer_norm", "final_layer_norm"),
        ),
    ),
    "falcon": replace(
        _NEOX, tied=True, attention="self_attention", qkv_bias=("bias", False), output_bias=("bias", False),
        mlp_bias=("bias", False), parallel=("parallel_attn", True), quantizable=False, partial_rotary=False,
        always_masked=True, names=Names("transformer.h", "transformer.word_embeddings", norm="transformer.ln_f"),
    ),
    "mixtral": replace(_LLAMA, qkv_bias=False, output_bias=False, mlp_bias=False, experts=True, sliding="all"),
    "qwen2_moe": replace(_LLAMA, qkv_bias=True, output_bias=False, mlp_bias=False, experts=True),
    "qwen3_moe": replace(_LLAMA, mlp_bias=False, qk_norm="head", experts=True),
}  # fmt: skip
