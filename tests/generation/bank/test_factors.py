"""Factors read from adapter files: through a bank they compute what PEFT computes; what has none is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.adapters_lab import IDS, Lab, logits, make_lab
from safetensors.torch import load_file, save_file
from tiny_bases import write_tokenizer
from tuning.method_zoo import METHODS, reload, save_method, save_tensors

from peftkit.backbone.load import Backbone
from peftkit.data.chat import Example
from peftkit.errors import TuningError
from peftkit.generation.bank.bank import Bank
from peftkit.generation.bank.factors import HELD, factors_of, why_not
from peftkit.generation.bank.layout import NO_SLOT
from peftkit.tuning.attach import attach
from peftkit.tuning.attachable import ATTACHABLE
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.skeleton import skeleton
from peftkit.tuning.stored import Stored, read

WEIGHTS = "adapter_model.safetensors"
ROWS = [Example(list(range(i, i + 40)), list(range(i, i + 40)), 1, i, "train") for i in (3, 90, 150)]
SOME = ["q_proj", "v_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HOLDABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "all-layers": ("llama", "LORA", {"lora_alpha": 6, "target_modules": ALL}),
    "all-linear": ("llama", "LORA", {"target_modules": "all-linear"}),
    "rslora": ("llama", "LORA", {"use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        *("llama", "LORA"),
        {
            "rank_pattern": {"q_proj": 2, "^model.layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {"down_proj": 9, "layers.0.self_attn.v_proj": 3},
        },
    ),
    "one-layer": ("llama", "LORA", {"layers_to_transform": [1]}),
    "without-one": ("llama", "LORA", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "tied-head": ("llama", "LORA", {"target_modules": ["lm_head", "q_proj"]}),
    "head": ("untied", "LORA", {"target_modules": ["lm_head", "q_proj"]}),
    "conv1d": ("gpt2", "LORA", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-head": ("gpt2", "LORA", {"target_modules": ["lm_head", "c_proj"]}),
    "adalora": ("llama", "ADALORA", {}),
    "adalora-pruned": (
        *("llama", "ADALORA"),
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {
                **{f"model.layers.{i}.self_attn.q_proj.lora_E": [True, False, True, True] for i in (0, 1)},
                **{f"model.layers.{i}.self_attn.o_proj.lora_E": [False] * 4 for i in (0, 1)},
            },
        },
    ),
    "adalora-conv1d": ("gpt2", "ADALORA", {"target_modules": ["c_attn", "c_fc"]}),
    "vera": ("llama", "VERA", {}),
    "vera-conv1d": ("gpt2", "VERA", {"target_modules": ["c_attn"]}),
    "miss": ("llama", "MISS", {"r": 5}),
    "miss-mini": ("llama", "MISS", {"target_modules": ["q_proj"], "init_weights": "mini", "mini_r": 4}),
    "delora": ("llama", "DELORA", {}),
}


def gpt2(folder: Path) -> Path:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = transformers.GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=64,
            vocab_size=259,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            initializer_range=0.2,
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lab]:
    folder = tmp_path_factory.mktemp("factors")
    return {
        "llama": make_lab(folder / "llama"),
        "untied": make_lab(folder / "untied", tie_word_embeddings=False),
        "gpt2": Lab(folder / "gpt2", gpt2(folder / "gpt2" / "base")),
    }


@pytest.fixture(scope="module")
def llama(labs: dict[str, Lab]) -> Lab:
    return labs["llama"]


def through_bank(stored: Stored, backbone: Backbone) -> torch.Tensor:
    """Logits of the same prompts, by the adapter in a slot; without a slot the base is what it was."""
    bank = Bank(backbone.model, dtype=torch.float32, device=backbone.device, slots=4)
    bank.put(2, factors_of(stored, backbone))
    with bank.seated([2, 2], IDS.shape[1]) as model:
        found = logits(model)
    with bank.seated([NO_SLOT, NO_SLOT], IDS.shape[1]) as model:
        torch.testing.assert_close(logits(model), logits(backbone.model), rtol=0, atol=1e-6)
    return found


@pytest.mark.parametrize("name", HOLDABLE)
def test_through_the_bank_it_computes_what_peft_computes(name: str, labs: dict[str, Lab]) -> None:
    base, method, settings = HOLDABLE[name]
    lab, bare = labs[base], labs[base].backbone().model
    folder = save_method(copy.deepcopy(bare), method, lab.folder / "saved" / name, **settings)
    stored = read(lab.publish(name, folder))
    expected, found = logits(reload(copy.deepcopy(bare), folder)), through_bank(stored, lab.backbone())
    assert (expected - logits(bare)).abs().max() > 0.05, "the adapter must show"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_every_method_that_is_held_was_tried() -> None:
    assert {method for _, method, _ in HOLDABLE.values()} == set(HELD)
    assert set(HELD) <= set(ATTACHABLE)


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        *(("lora", 32), ("lora", 8), ("lora", 4), ("rslora", 8), ("lora_plus", 32), ("pissa", 32), ("pissa", 4)),
        *(("loftq", 4), ("eva", 32), ("adalora", 4), ("vera", 8)),
    ],
)
def test_what_is_trained_here_is_held_over_its_own_base(method: str, bits: int, llama: Lab, tmp_path: Path) -> None:
    """PiSSA and LoftQ are saved as changes of the base; over packed weights a change is the same."""
    backbone = llama.backbone(bits)
    tuned = inject(
        llama.fresh(bits),
        AdapterSpec.model_validate({"method": method, **_shape(method)}),
        rows=ROWS if method == "eva" else (),
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    stored = read(llama.publish(f"{method}-{bits}", save_adapter(tuned, tmp_path / "saved")))
    expected = logits(attach(backbone, stored.version).model)
    assert (expected - logits(backbone.model)).abs().max() > 0.05
    torch.testing.assert_close(through_bank(stored, backbone), expected, rtol=0, atol=1e-4)


def _shape(method: str) -> dict[str, Any]:
    return {"r": 4, "init_r": 6} if method == "adalora" else {"r": 4}


def test_factors_that_are_stored_in_16_bits_are_scaled_in_32(llama: Lab, tmp_path: Path) -> None:
    folder = save_method(copy.deepcopy(llama.backbone().model), "LORA", tmp_path / "saved", lora_alpha=7)
    path = folder / WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    stored = read(llama.publish("sixteen", folder))
    for module, (right, left) in factors_of(stored, llama.backbone()).items():
        name = f"base_model.model.{module}.lora_"
        assert right.dtype == left.dtype == torch.float32
        assert torch.equal(right, stored.tensors[f"{name}A.weight"].float())
        assert torch.equal(left, stored.tensors[f"{name}B.weight"].float() * (7 / 4))


BY_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "saved": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "base-bias": ({"bias": "all"}, "bias='all'"),
    "experts": ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
}


@pytest.mark.parametrize("name", BY_SETTINGS)
def test_settings_that_no_bank_holds_are_named_without_reading(name: str) -> None:
    settings, word = BY_SETTINGS[name]
    assert why_not("peft", {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}) is None
    reason = why_not("peft", {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **settings})
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize("method", sorted(set(ATTACHABLE) - set(HELD)))
def test_every_other_method_is_refused_by_its_name(method: str) -> None:
    reason = why_not("peft", {"peft_type": method})
    assert reason is not None
    assert method in reason


def test_virtual_tokens_and_whole_tensors_are_refused_by_name(llama: Lab, tmp_path: Path) -> None:
    assert "virtual tokens" in str(why_not("peft", {"peft_type": "PREFIX_TUNING"}))
    folder = save_tensors(tmp_path / "whole", {"model.norm.weight": torch.ones(64)})
    with pytest.raises(TuningError, match="cannot lie in a bank: it replaces whole tensors"):
        factors_of(read(llama.publish("whole", folder, "tensors")), llama.backbone())


def _without_first(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    gone = next(name for name in sorted(tensors) if "layers.0.self_attn.q_proj" in name)
    for part in "AB":
        del tensors[gone.replace("lora_A", f"lora_{part}")]


def _untargeted(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["target_modules"] = ["q_proj"]


def _half(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _narrow(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :8].contiguous()


def _nan(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _embedding(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    module = "base_model.model.model.embed_tokens"
    tensors |= {f"{module}.lora_embedding_A": torch.ones(4, 259), f"{module}.lora_embedding_B": torch.ones(64, 4)}
    config["target_modules"] = [*SOME, "embed_tokens"]


def _copy_of_head(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(259, 64)


def _unknown(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["use_something_new"] = True


def _stranger(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(4, 4)


SPOILT: dict[str, tuple[Callable[..., None], str]] = {
    "missing": (_without_first, "1 layers that it has no factors for: model.layers.0.self_attn.q_proj"),
    "untargeted": (_untargeted, "layers that it does not target"),
    "half": (_half, "lacks lora_B.weight"),
    "narrow": (_narrow, "shape"),
    "nan": (_nan, "NaN"),
    "embedding": (_embedding, "LoRA of an embedding"),
    "head": (_copy_of_head, "copy of lm_head.weight"),
    "unknown": (_unknown, "use_something_new"),
    "stranger": (_stranger, "lora_C"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_files_that_are_more_or_less_than_factors_are_refused(name: str, llama: Lab) -> None:
    spoil, word = SPOILT[name]
    folder = llama.payload(f"spoilt-{name}", 1)
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    whole = llama.publish(f"whole-{name}", folder)
    assert len(factors_of(read(whole), llama.backbone())) == 6
    spoil(tensors, config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(TuningError, match=word):
        factors_of(read(llama.publish(f"spoilt-{name}", folder)), llama.backbone())


def test_vera_without_its_projections_is_no_matter_of_its_files(llama: Lab, tmp_path: Path) -> None:
    """PEFT draws them again when it loads, which a bank does not."""
    model = skeleton(llama.backbone().model)
    folder = save_method(model, "VERA", tmp_path / "vera", save_projection=False)
    with pytest.raises(TuningError, match="projections"):
        factors_of(read(llama.publish("drawn", folder)), llama.backbone())


def test_zoo_and_reasons_cover_each_other() -> None:
    assert set(HELD) <= set(METHODS)
