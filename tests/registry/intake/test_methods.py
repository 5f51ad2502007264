"""Every method of the installed PEFT: the table knows its keys, and a real adapter is taken or refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from registry.intake.method_table import TABLE, known_keys, spelled
from transformers import LlamaConfig, LlamaForCausalLM

from peftkit.registry.intake import AdapterRefused, inspect, methods
from peftkit.registry.intake.methods import peft_version, task_types

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, **TARGETS},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, **TARGETS},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "C3A": {"block_size": 32, **TARGETS},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [0, 1], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "FOURIERFT": {"n_frequency": 10, **TARGETS},
    "FROD": {"progressbar": False, **TARGETS},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "ROAD": {"group_size": 32, **TARGETS},
    "SHADOW": {},
    "SHIRA": {"r": 4, **TARGETS},
    "TRAINABLE_TOKENS": {"token_indices": [0, 5]},
    "VBLORA": {"num_vectors": 8, "vector_length": 32, **TARGETS},
    "WAVEFT": {"n_frequency": 10, **TARGETS},
}
REFUSED = {"ADAMSS", "XLORA"}

LORAS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "copied head": {"modules_to_save": ["lm_head"]},
    "copied norms": {"modules_to_save": ["norm"]},
    "copied and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding with dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "token rows": {"trainable_token_indices": [0, 3]},
    "all-linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r"model\.layers\.[01]\.(self_attn|mlp)\.(q|up)_proj"},
    "rank pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": peft.VeloraConfig()} if hasattr(peft, "VeloraConfig") else {},
    "qalora": {"use_qalora": True},
    "parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=True, **widths)).eval()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny().state_dict().items()}
    del shapes["lm_head.weight"]  # tied: a checkpoint holds it once
    return shapes


def saved(config: Any, folder: Path) -> torch.Tensor:
    """Save a perturbed adapter and return its logits."""
    model = get_peft_model(tiny(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    embedding = "embed_tokens" in str(config.to_dict().get("target_modules"))
    model.save_pretrained(str(folder), save_embedding_layers=embedding)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    kind = model.active_peft_config.peft_type
    more = {"task_ids": torch.tensor([0])} if kind in ("MULTITASK_PROMPT_TUNING", "POLY") else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(8).view(1, 8), use_cache=False, **more).logits
    return found


def check_taken_and_loads_the_same(config: Any, tmp_path: Path) -> dict[str, Any]:
    wanted = saved(config, tmp_path / "adapter")
    taken = inspect(tmp_path / "adapter", tmp_path / "quarantine", base_shapes())
    assert taken.config is not None
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "quarantine"), adapter_name="other")
    assert torch.equal(logits(loaded), wanted)
    assert not torch.equal(wanted[:, -8:], tiny()(input_ids=torch.arange(8).view(1, 8)).logits)
    return taken.config


def test_the_table_knows_the_installed_peft() -> None:
    """Red after an upgrade: method_table.py says how to write the table anew."""
    assert peft_version() == peft.__version__
    assert task_types() == sorted(task.value for task in peft.TaskType)
    assert {name: dict(method.keys) for name, method in methods().items()} == known_keys()
    assert {name for name, method in methods().items() if method.refused} == REFUSED
    assert all(method.refused or method.tensors or method.whole for method in methods().values())


def test_the_table_is_spelled_as_its_script_spells_it() -> None:
    assert TABLE.read_text() == spelled(json.loads(TABLE.read_text()))


@pytest.mark.parametrize("name", sorted({kind.value for kind in CONFIGS} - REFUSED))
def test_an_adapter_of_every_method_is_taken_and_loads_the_same(name: str, tmp_path: Path) -> None:
    config = CONFIGS[peft.PeftType(name)](task_type="CAUSAL_LM", **SETTINGS.get(name, TARGETS))
    check_taken_and_loads_the_same(config, tmp_path)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_other_methods_are_refused_by_name(name: str, tmp_path: Path) -> None:
    saved(LoraConfig(task_type="CAUSAL_LM", **SETTINGS["LORA"]), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": name}))
    with pytest.raises(AdapterRefused, match=name) as caught:
        inspect(tmp_path / "adapter", tmp_path / "quarantine", base_shapes())
    assert caught.value.rule == "config.refused-method"


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
def test_every_sound_kind_of_lora_is_taken_and_loads_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    check_taken_and_loads_the_same(LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **TARGETS, **settings}), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_lora_that_rewrote_the_base_is_refused_until_it_is_converted(init: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=init, **SETTINGS["LORA"]))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(AdapterRefused) as caught:
        inspect(tmp_path / "adapter", tmp_path / "quarantine", base_shapes())
    assert caught.value.rule == "config.base-rewriting"
    model.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
        save_embedding_layers=False,
    )
    inspect(tmp_path / "converted", tmp_path / "quarantine", base_shapes())
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "quarantine"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
