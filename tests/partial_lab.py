"""Partial fine-tunes of tiny bases: made, moved off their start as training would, and published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_bases import write_base, write_tokenizer
from tiny_families import write_family

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.places import remember_place
from peftkit.base.ref import BaseSpec
from peftkit.events import Report, silent
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import dense_layers
from peftkit.tuning.tuned import Tuned

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])


def write_bases(root: Path) -> dict[str, Path]:
    """One folder for each family; all are two blocks of width 64."""
    for kind in ("qwen2", "gemma2"):
        write_family(root / kind, kind, intermediate_size=128)
    return {
        "llama": write_base(root / "llama"),
        "untied": write_base(root / "untied", tie_word_embeddings=False),
        "gpt2": write_gpt2(root / "gpt2"),
        "qwen2": root / "qwen2",
        "gemma2": root / "gemma2",
    }


def write_gpt2(folder: Path) -> Path:
    """Two blocks of width 64 with random biases; its linear layers keep their weights as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3)
    model.save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


def tune(
    base: Path, cache: Path, bits: int = 32, *, dtype: str = "auto", report: Report = silent, **settings: Any
) -> Tuned:
    """A method in a base; what is trained is loaded unquantized, as a run loads it."""
    spec = AdapterSpec(**settings)
    quant = QuantSpec.model_validate({"bits": bits, "dtype": dtype, "device": "cpu"})
    backbone = load_backbone(BaseSpec(source=str(base)), quant, cache, dense=dense_layers(spec), report=report)
    return inject(backbone, spec, report=report)


def moved(tuned: Tuned, seed: int = 1, size: float = 0.05) -> Tuned:
    """Add random numbers to everything that is trained; bfloat16 holds none of the sums."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter += size * torch.randn(parameter.shape, generator=draw)
    return tuned


def publish(registry: Registry, name: str, tuned: Tuned, payload: Path, cache: Path) -> Version:
    """Save and publish it as a run does; this machine then knows the base by its content."""
    save_adapter(tuned, payload)
    backbone = tuned.backbone
    remember_place(backbone.identity, backbone.base.folder, cache)
    fields = {
        "kind": tuned.kind,
        "base": base_fields(backbone),
        "adapter": {**tuned.spec.record(), "trainable_parameters": tuned.trainable_parameters},
        "parents": list(tuned.parents),
    }
    return registry.publish(name, payload, Draft.model_validate(fields), base=backbone.identity.record)


def logits(model: Any) -> torch.Tensor:
    """Of two short rows."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found
