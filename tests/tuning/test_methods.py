"""Every PEFT method over every precision: what PEFT computes, without touching the base; the rest refused for cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from tuning.method_zoo import METHODS, SOME, reload, save_method

from peftkit.backbone.bnb import Linear4bit, Linear8bitLt
from peftkit.backbone.contain import base_tensors
from peftkit.backbone.quantize import dense_weight
from peftkit.errors import TuningError
from peftkit.generation.generate import generate
from peftkit.tuning.attach import Attached
from peftkit.tuning.attachable import ATTACHABLE, NOT_ATTACHABLE, check_config
from peftkit.tuning.skeleton import skeleton

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
REFUSED = [
    (method, bits) for method in sorted(METHODS) for bits in (4, 8) if bits not in ATTACHABLE.get(method, (4, 8))
]


def logits(model: Any) -> torch.Tensor:
    """The last logits of every given token; PEFT's own prompt models put those of virtual tokens before them."""
    with torch.no_grad():
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


def densify(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit | Linear8bitLt):
                dense = nn.Linear(child.in_features, child.out_features, bias=False)
                dense.weight = nn.Parameter(dense_weight(child), requires_grad=False)
                setattr(module, name, dense)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer"):
        vars(model).pop(name, None)
    return model


def pointers(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every module with what hangs on it, by identity."""
    found: list[tuple[Any, ...]] = []
    for module in model.modules():
        hung = [("", type(module)), *vars(module).items(), *module._modules.items()]
        hung += [*module._parameters.items(), *module._buffers.items()]
        found += [(name, id(value)) for name, value in hung]
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[..., Path]:
    """Folder of an adapter of a method, made once over 32 bits."""
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec

    top = tmp_path_factory.mktemp("methods")
    backbone = load_backbone(BaseSpec(source=str(tiny_base)), QuantSpec(bits=32), top / "cache")

    def saved(method: str, **settings: Any) -> Path:
        folder = top / f"{method}-{abs(hash(repr(sorted(settings.items()))))}"
        return folder if folder.exists() else save_method(skeleton(backbone.model), method, folder, **settings)

    return saved


def test_every_method_of_this_peft_is_decided() -> None:
    assert ATTACHABLE.keys() | NOT_ATTACHABLE.keys() == {method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not ATTACHABLE.keys() & NOT_ATTACHABLE.keys()
    assert METHODS.keys() >= ATTACHABLE.keys()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("method", sorted(ATTACHABLE))
def test_an_attached_method_computes_what_peft_does(
    load: Callable[..., Any], saved: Callable[..., Path], publish: Callable[..., Any], method: str, bits: int
) -> None:
    if bits not in ATTACHABLE[method]:
        with pytest.raises(TuningError, match=f"{method}.*this one has {bits}"):
            Attached(load(bits=bits)).attach(publish("x", saved(method)))
        return
    host = Attached(load(bits=bits))
    model = host.backbone.model
    base = logits(model)
    before, tensors = pointers(model), {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    with host.using(host.attach(publish("x", saved(method)))) as adapted:
        found = logits(adapted)
        assert torch.equal(logits(adapted), found)
    assert torch.equal(found, logits(reload(load(bits=bits).model, saved(method))))
    assert not torch.allclose(found, base, atol=1e-3)
    if bits < 16:
        dense = logits(reload(densify(load(bits=bits).model), saved(method)))
        assert float((found - dense).abs().max()) < 1e-5
    host.detach("x")
    assert pointers(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base_tensors(model).items())


@pytest.mark.parametrize(("method", "bits"), REFUSED)
def test_what_is_refused_fails_or_computes_something_else(
    load: Callable[..., Any], saved: Callable[..., Path], method: str, bits: int
) -> None:
    """A contract: when PEFT mends one of these, its row in ATTACHABLE can grow."""
    try:
        found = logits(reload(load(bits=bits).model, saved(method)))
    except Exception:
        return
    dense = logits(reload(densify(load(bits=bits).model), saved(method)))
    assert float((found - dense).abs().max()) > 0.01


@pytest.mark.parametrize("method", sorted(NOT_ATTACHABLE))
def test_refused_methods_say_why(method: str) -> None:
    with pytest.raises(TuningError) as caught:
        check_config({"peft_type": method}, "x@1", 16)
    assert NOT_ATTACHABLE[method] in caught.value.fact


def test_lily_depends_on_what_comes_later(load: Callable[..., Any], saved: Callable[..., Path]) -> None:
    model = reload(load(bits=32).model, saved("LILY"))
    later = IDS.clone()
    later[:, 4:] = 7
    with torch.no_grad():
        found = model(input_ids=later).logits[:, :4]
    assert float((found - logits(model)[:, :4]).abs().max()) > 0.01


EXTRAS = {
    "rank pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
    "bias of its own": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved norm": {"modules_to_save": ["norm"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [40, 50]}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all linear": {"target_modules": "all-linear", "use_rslora": True, "exclude_modules": ["o_proj"]},
}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_settings_of_lora(
    load: Callable[..., Any], saved: Callable[..., Path], publish: Callable[..., Any], extra: str, bits: int
) -> None:
    folder = saved("LORA", **EXTRAS[extra])
    host = Attached(load(bits=bits))
    base = logits(host.backbone.model)
    with host.using(host.attach(publish("x", folder))) as model:
        found = logits(model)
    assert torch.equal(found, logits(reload(load(bits=bits).model, folder)))
    assert not torch.allclose(found, base, atol=1e-3)
    assert torch.equal(logits(host.model), base)


REFUSED_SETTINGS = {
    "fused experts": {"target_parameters": ["experts.gate_up_proj"]},
    "layers replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "biases": {"bias": "lora_only"},
    "init": {"init_lora_weights": "pissa"},
    "a pattern": {"target_modules": "(a+)+$"},
    "an excluding pattern": {"exclude_modules": "(a+)+$"},
    "a pattern in rank_pattern": {"rank_pattern": {"(a+)+$": 2}},
    "code": {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
}


@pytest.mark.parametrize("what", sorted(REFUSED_SETTINGS))
def test_settings_that_are_refused(what: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": SOME}
    check_config(config, "x@1", 4)
    with pytest.raises(TuningError, match=next(iter(REFUSED_SETTINGS[what]))):
        check_config({**config, **REFUSED_SETTINGS[what]}, "x@1", 4)


# -- virtual tokens


@pytest.mark.parametrize("method", PROMPTS)
def test_logits_and_answers_are_those_of_the_given_tokens(
    load: Callable[..., Any], saved: Callable[..., Path], publish: Callable[..., Any], method: str
) -> None:
    host = Attached(load(bits=32))
    host.activate(host.attach(publish("x", saved(method))))
    with torch.no_grad():
        whole = host.model(input_ids=IDS).logits
        assert whole.shape[1] == IDS.shape[1]
        kept = host.model(input_ids=IDS, logits_to_keep=torch.tensor([1, 3])).logits
        last = host.model(input_ids=IDS, logits_to_keep=1).logits
    assert torch.allclose(kept, whole[:, [1, 3]], atol=1e-6)
    assert torch.allclose(last, whole[:, -1:], atol=1e-6)
    prompts, backbone = [[1, 40, 50], [1, 60, 70, 80, 90, 91, 92]], host.backbone
    together = generate(host.model, prompts, backbone.tokenizer, device=backbone.device, max_new_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        for token in answer.ids:
            with torch.no_grad():
                assert int(host.model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("method", PROMPTS)
def test_a_cache_without_the_virtual_tokens_is_refused(
    load: Callable[..., Any], saved: Callable[..., Path], publish: Callable[..., Any], method: str
) -> None:
    from transformers import DynamicCache

    host = Attached(load(bits=32))
    host.activate(host.attach(publish("x", saved(method))))
    for call in (host.model, host.model.generate):
        with pytest.raises(TuningError, match="virtual tokens"):
            call(input_ids=IDS, past_key_values=DynamicCache(config=host.backbone.model.config))
