"""Tiny random models of many architectures with LoRA in them, rows of several turns, and steps that are compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, get_peft_model

from peftkit.backbone.decide import Placement
from peftkit.backbone.load import Backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.data.chat import IGNORED, Example
from peftkit.training.objective import Objective
from peftkit.training.passes.paths import Paths
from peftkit.training.step import Step
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned, trained_names

CPU = torch.device("cpu")
VOCABULARY = 259
"""A prime: a tensor with this axis has to do with logits."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
}
_OLD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "BioGptForCausalLM": {
        **SHAPE,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        **dict.fromkeys(("layerdrop", "activation_dropout"), 0.0),
    },
    "BloomForCausalLM": {**_OLD, "n_layer": 2, "n_head": 2},
    "BambaForCausalLM": {
        **SHAPE, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    },
    "CodeGenForCausalLM": {**_GPT, "n_head": 4, "rotary_dim": 16},
    "DeepseekV3ForCausalLM": {
        **SHAPE, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1,
    },
    "Exaone4ForCausalLM": {**SHAPE, "sliding_window": 13},
    "FalconForCausalLM": {**_OLD, "num_hidden_layers": 2, "num_attention_heads": 2},
    "Gemma2ForCausalLM": {
        **SHAPE, "head_dim": 32, "sliding_window": 8, "tie_word_embeddings": True, "final_logit_softcapping": 5.0,
    },
    "Gemma3ForCausalLM": {**SHAPE, "head_dim": 32, "sliding_window": 16, "tie_word_embeddings": True},
    "GPT2LMHeadModel": _GPT,
    "GPTBigCodeForCausalLM": _GPT,
    "GPTJForCausalLM": {**_GPT, "rotary_dim": 16},
    "GPTNeoForCausalLM": {
        **_OLD, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6,
    },
    "GptOssForCausalLM": {**SHAPE, "num_local_experts": 4, "head_dim": 32, "sliding_window": 64},
    "GraniteForCausalLM": {**SHAPE, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "JambaForCausalLM": {
        **SHAPE, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "Lfm2ForCausalLM": {**SHAPE, "layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": {**SHAPE, "attention_chunk_size": 13},
    "Mamba2ForCausalLM": {
        **_OLD, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1,
    },
    "MiniMaxForCausalLM": {**SHAPE, "num_local_experts": 4, "block_size": 8},
    "MixtralForCausalLM": {**SHAPE, "num_local_experts": 4},
    "ModernBertDecoderForCausalLM": {**SHAPE, "num_hidden_layers": 3, "local_attention": 28},
    "MptForCausalLM": {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "Olmo3ForCausalLM": {**SHAPE, "sliding_window": 13},
    "OPTForCausalLM": {
        **_OLD, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64,
        "max_position_embeddings": 512, "dropout": 0.0, "pad_token_id": 0,
        "init_std": 0.2,
    },
    "PersimmonForCausalLM": {**SHAPE, "num_key_value_heads": 2},
    "Qwen2MoeForCausalLM": {**SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "Qwen3NextForCausalLM": {
        **SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 64, "head_dim": 32, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "RecurrentGemmaForCausalLM": {**SHAPE, "lru_width": 64, "attention_window_size": 32},
    "RwkvForCausalLM": {**_OLD, "num_hidden_layers": 2, "attention_hidden_size": 64},
    "VaultGemmaForCausalLM": {**SHAPE, "head_dim": 32, "sliding_window": 13},
    "XGLMForCausalLM": {
        "vocab_size": VOCABULARY, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 2, "init_std": 0.2,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "layerdrop"), 0.0),
    },
}  # fmt: skip
"""Settings of a class; SHAPE where it has none here."""


def lively(model: Any) -> Any:
    """Norms and biases that do something, instead of ones and zeros."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def tiny(name: str, *, kind: Any = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a transformers class, or of a class `kind` with that one's settings."""
    named = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = (kind or named)(named.config_class(**{**SETTINGS.get(name, SHAPE), **changes}))
    return lively(model).to(dtype).eval()


def adapted(model: Any, *, compute: torch.dtype = torch.float32, **lora: Any) -> Tuned:
    """A model with LoRA in every linear layer, or as asked for, whose factors are random: it moves the logits."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", "r": 4, "lora_alpha": 6, **lora})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inside = get_peft_model(model, config)
    placement = Placement(CPU, compute, torch.float32, "sdpa", ())
    nothing = cast(Any, None)  # no passes read a tokenizer or an identity
    backbone = Backbone(model, nothing, nothing, nothing, QuantSpec(bits=32), placement)
    return moved(Tuned(inside, backbone, AdapterSpec(r=4), trained_names(inside)))


def moved(tuned: Tuned, std: float = 0.05) -> Tuned:
    """The same, every trained number moved by noise: `lora_B` begins as zeros."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return tuned


def turns(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Rows of a conversation: several answers in each, and the first token of some has a label too."""
    draw = random.Random(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        answer = [(at // 3 + index) % 2 == 1 or at == length - 1 for at in range(length)]
        labels = [token if learned else IGNORED for token, learned in zip(ids, answer, strict=True)]
        made.append(Example(ids, labels, 1, index, f"row {index}"))
    return made


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the trained parameters have gathered, and none of it left behind."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient tensor, relative to its norm."""
    assert found
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in found)


Trace = list[tuple[float, dict[str, torch.Tensor]]]


def trace(
    tuned: Tuned, steps: Sequence[Sequence[Example]], ways: Sequence[Paths], tokens: int, loss: Objective | None = None
) -> Trace:
    """The loss and gradients of every step of a short training, by each of `ways` in turn."""
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=1e-3)
    tuned.model.train()
    found = []
    for rows, paths in zip(steps, cycle(ways)):
        optimizer.zero_grad()
        result = Step(tuned.model, rows, pad_id=2, device=CPU, paths=paths, objective=loss).run(tokens)
        trained = {name: p.grad.clone() for name, p in tuned.trainable.items() if p.grad is not None}
        found.append((result.loss, trained))
        optimizer.step()
    return found
