"""Adapters of every LoRA variant, saved by PEFT over the tiny base and imported into one registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "ranks": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}},
    "alphas": {"target_modules": LINEAR, "alpha_pattern": {"v_proj": 1, "layers.0.mlp.up_proj": 32}},
    "all": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 1},
    },
    "bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 1}},
}
OTHER: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [40, 50]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "vocabulary": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(scope="session")
def biased_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied base whose attention has biases, with a tokenizer that llama.cpp knows."""
    from tiny_bases import write_base
    from tiny_families import write_bpe

    folder = write_base(tmp_path_factory.mktemp("bases") / "biased", attention_bias=True, vocab_size=300)
    write_bpe(folder)
    return folder


@pytest.fixture(scope="session")
def bare(biased_base: Path) -> Callable[[], Any]:
    """A fresh model of the base."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(biased_base)


@pytest.fixture(scope="session")
def saved(bare: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that PEFT wrote, by variant; every trainable tensor is random."""
    import torch
    from peft import IA3Config, LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("saved")
    configs: dict[str, Any] = {
        name: LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings})
        for name, settings in {**LORA, **OTHER}.items()
    }
    configs["ia3"] = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, config in configs.items():
            model = get_peft_model(bare(), config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.2 * torch.randn(parameter.shape)
            model.save_pretrained(str(folder / name), save_embedding_layers=name == "vocabulary")
    file = folder / "vocabulary" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("base_layer.weight"):  # saved with the adapter; PEFT loads it into the base
            tensors[name] = tensors[name] + 0.1
    save_file(tensors, file)
    return {name: folder / name for name in configs}


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def registry(saved: dict[str, Path], biased_base: Path, cache_folder: Path, tmp_path_factory: Any) -> Any:
    """A registry with every variant under its name, and one adapter of kind `tensors`."""
    import torch
    from safetensors.torch import save_file

    from peftkit.base.identity import identify
    from peftkit.base.places import remember_place
    from peftkit.registry import Draft, Registry
    from peftkit.registry.exchange import ImportBase, import_adapter

    store = Registry(tmp_path_factory.mktemp("registry") / "adapters")
    identity = identify(biased_base, cache_folder)
    remember_place(identity, str(biased_base), cache_folder)
    base = ImportBase(identity.record, biased_base.name, None, None)
    for name, folder in saved.items():
        import_adapter(store, folder, name=name, base=base)
    payload = tmp_path_factory.mktemp("tensors")
    save_file({"model.norm.weight": torch.full((64,), 2.0)}, payload / "tensors.safetensors")
    fields = {"source": biased_base.name, "record": identity.record.id, "fingerprint": identity.fingerprint}
    fields["parts"] = identity.parts()
    store.publish("norms", payload, Draft(kind="tensors", base=fields), base=identity.record)
    return store


@pytest.fixture
def export(registry: Any, cache_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`export_for` into a new folder: the engine, the adapters, and options."""
    from peftkit.release.export.entry import ExportOptions, export_for

    def export(engine: str, *names: str, out: Path | None = None, **options: Any) -> Any:
        folder = out or tmp_path / f"{engine}-{'-'.join(names)}"
        return export_for(engine, registry, names, folder, cache_folder, options=ExportOptions(**options))

    return export
