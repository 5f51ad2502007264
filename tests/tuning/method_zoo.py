"""One small configuration of every PEFT method for the tiny base, and adapters of them with random tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import torch
from peft import PeftModelForCausalLM, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file

SOME = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]  # VeRA's shared matrices and C3A's blocks need equal widths here
METHODS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": SOME},
    "ADALORA": {"target_modules": SOME, "total_step": 10, "init_r": 4, "target_r": 2},
    "BOFT": {"target_modules": SOME, "boft_block_size": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "IA3": {"target_modules": SOME, "feedforward_modules": ["down_proj"]},
    "BEFT": {"target_modules": SOME},
    "LILY": {"target_modules": SOME},
    "LOHA": {"r": 4, "target_modules": SOME},
    "LOKR": {"r": 4, "target_modules": SOME},
    "OFT": {"target_modules": SOME, "oft_block_size": 4, "r": 0},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VERA": {"r": 4, "target_modules": SQUARE},
    "FROD": {"target_modules": SOME},
    "PVERA": {"r": 4, "target_modules": SQUARE},
    "FOURIERFT": {"n_frequency": 16, "target_modules": SOME},
    "GLORA": {"target_modules": SOME},
    "HRA": {"r": 4, "target_modules": SOME},
    "VBLORA": {"r": 4, "target_modules": SOME, "num_vectors": 8, "vector_length": 32, "topk": 2},
    "UNILORA": {"target_modules": SOME},
    "CPT": {"cpt_token_ids": [40, 41, 42], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "MISS": {"r": 4, "target_modules": SOME},
    "RANDLORA": {"r": 4, "target_modules": SOME},
    "ROAD": {"target_modules": SOME, "group_size": 32},
    "TRAINABLE_TOKENS": {"token_indices": [40, 50], "target_modules": ["embed_tokens"]},
    "HIRA": {"target_modules": SOME},
    "SHIRA": {"r": 4, "target_modules": SOME},
    "C3A": {"target_modules": SQUARE, "block_size": 64},
    "WAVEFT": {"target_modules": SOME, "n_frequency": 16},
    "OSF": {"target_modules": SOME},
    "DELORA": {"r": 4, "target_modules": SOME},
    "GRALORA": {"r": 4, "target_modules": SOME, "gralora_k": 2},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "TINYLORA": {"target_modules": SOME},
    "PSOFT": {"r": 4, "target_modules": SOME},
    "PEANUT": {"target_modules": SOME},
    "SHADOW": {},
    "SUPERTUNING": {"target_modules": SOME},
    "DEFT": {"target_modules": SOME},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 32},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
}


def save_method(model: Any, method: str, folder: Path, *, seed: int = 1, **settings: Any) -> Path:
    """Write an adapter of this method for `model` (which is changed), its trainable tensors moved at random."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **{**METHODS[method], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
    tuned.eval()
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
    return folder


def reload(model: Any, folder: Path) -> Any:
    """What PEFT itself makes of a saved adapter, in a bare `model`."""
    with torch.random.fork_rng():
        return PeftModelForCausalLM.from_pretrained(model, str(folder)).eval()


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a payload of kind `tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")
    return folder
