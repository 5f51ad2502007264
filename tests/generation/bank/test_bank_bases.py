"""The bank over every precision and family: which layers share an input, the same answers, the base untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_lab import ATTENTION, LINEAR, alone, answers, bank_of, factors_of, peft_model
from partial_lab import write_gpt2
from tiny_bases import write_base
from tiny_families import FAMILIES, write_family
from transformers import AutoConfig, AutoModelForCausalLM

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.generation.bank.bank import Bank
from peftkit.generation.bank.layout import NO_SLOT
from peftkit.tuning.skeleton import places

QUANT: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "int8": {"bits": 8},
    "bf16": {"bits": 16, "dtype": "bfloat16", "compute_dtype": "bfloat16"},
    "fp32": {"bits": 32},
}
CONV1D = ["c_attn", "c_proj", "c_fc"]
ROWS = [1, NO_SLOT, 0, 2, 1]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a base of a family; files are written once."""
    top = tmp_path_factory.mktemp("bases")

    def write(kind: str) -> Path:
        folder = top / kind
        if not folder.exists():
            if kind == "gpt2":
                write_gpt2(folder)
            elif kind == "tied":
                write_base(folder, initializer_range=0.3)
            else:
                write_family(folder, kind, intermediate_size=128)
        return folder

    return lambda kind, quant: load_backbone(
        BaseSpec(source=str(write(kind))), QuantSpec(device="cpu", **QUANT[quant]), top / "cache"
    )


def three(model: Any) -> list[Any]:
    """Adapters of all linear layers, of some with their own ranks, and of the head."""
    linear = CONV1D if "GPT2" in type(model).__name__ else LINEAR
    some = CONV1D[:1] if linear == CONV1D else ["q_proj", "v_proj"]
    settings: list[dict[str, Any]] = [
        {"target_modules": linear},
        {"r": 24, "target_modules": some, "use_rslora": True},
        {"r": 3, "target_modules": [*linear[-2:], "lm_head"], "ensure_weight_tying": False},
    ]
    return [peft_model(model, seed, **each) for seed, each in enumerate(settings)]


def state(model: Any) -> tuple[list[Any], list[tuple[str, torch.Tensor]]]:
    """The module tree, with what hangs on each module, and every byte."""
    tree = [(path, id(m), type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for path, m in model.named_modules()]
    tensors = [(key, tensor.clone()) for _, key, tensor in places(model)]
    tensors += [(key, value.clone()) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)]
    return tree, tensors


def same(before: Any, after: Any) -> bool:
    pairs = zip(before[1], after[1], strict=True)
    return before[0] == after[0] and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def together(bank: Bank) -> list[tuple[str, ...]]:
    """Last names of the layers of each group."""
    return [tuple(name.rpartition(".")[2] for name in group.names) for group in bank._groups]


@pytest.mark.parametrize("kind", [*sorted(FAMILIES), "tied", "gpt2"])
def test_families(kind: str, load: Load) -> None:
    model = load(kind, "fp32").model
    before, adapters = state(model), three(model)
    bank = bank_of(model, adapters)
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    alone_each = [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)]
    assert together(bank) == 2 * (alone_each if kind == "gpt2" else block) + [("lm_head",)]
    ids = torch.randint(3, 250, (len(ROWS), 9), generator=torch.Generator().manual_seed(0))
    found = answers(bank, ROWS, ids)
    for row, slot in enumerate(ROWS):
        expected = alone(model if slot == NO_SLOT else adapters[slot], ids[row])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)
        assert torch.equal(found[row].argmax(-1), expected.argmax(-1))
    bank.clear(1)
    bank.put(5, factors_of(adapters[1]))
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized(kind: str, quant: str, load: Load) -> None:
    model = load(kind, quant).model
    ids = torch.randint(3, 250, (len(ROWS), 9), generator=torch.Generator().manual_seed(0))
    alone(model, ids[0])  # int8 layers move their codes at the first pass
    before, adapters = state(model), three(model)
    found = answers(bank_of(model, adapters), ROWS, ids)
    for row, slot in enumerate(ROWS):
        expected = alone(model if slot == NO_SLOT else adapters[slot], ids[row])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16(kind: str, load: Load) -> None:
    """Factors in float32 are added before the one rounding, as PEFT does: no farther from it than rounding moves it."""
    model = load(kind, "bf16").model
    assert model.dtype == torch.bfloat16
    before, adapters = state(model), three(model)
    ids = torch.randint(3, 250, (len(ROWS), 9), generator=torch.Generator().manual_seed(0))
    found = answers(bank_of(model, adapters), ROWS, ids)
    exact_model = load(kind, "bf16").model.float()
    exact = three(exact_model)
    for row, slot in enumerate(ROWS):
        expected = alone(model if slot == NO_SLOT else adapters[slot], ids[row])
        rounding = (alone(exact_model if slot == NO_SLOT else exact[slot], ids[row]) - expected).abs().max()
        assert found.dtype == torch.bfloat16
        assert (found[row] - expected).abs().max() <= rounding
    assert same(before, state(model))


def from_config(kind: str, **settings: Any) -> Any:
    tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **tokens, **sizes, **settings)).eval()


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}
UNUSUAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mixtral": ({**HEADS, "num_local_experts": 4}, ATTENTION),
    "qwen2_moe": (
        {**HEADS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        [*LINEAR, "shared_expert_gate"],
    ),
    "phi3": (HEADS, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mamba": ({"state_size": 8}, ["in_proj", "x_proj"]),
}


@pytest.mark.parametrize("kind", sorted(UNUSUAL))
def test_fused_experts_a_shared_expert_and_layers_whose_weight_is_used_without_a_call(kind: str) -> None:
    """Mamba multiplies by the weight of `dt_proj` and never calls it: a bank could add nothing there, and says so."""
    settings, targets = UNUSUAL[kind]
    model = from_config(kind, **settings).requires_grad_(False)
    adapters = [peft_model(model, seed, r=4 + 4 * seed, target_modules=targets) for seed in range(2)]
    bank = bank_of(model, adapters)
    groups = together(bank)
    if kind == "qwen2_moe":
        assert ("gate_proj", "up_proj", "shared_expert_gate") in groups
    if kind == "mamba":
        assert not [path for path in bank.paths if path.endswith("dt_proj")]
    ids = torch.randint(3, 250, (4, 6), generator=torch.Generator().manual_seed(0))
    rows = [1, NO_SLOT, 0, 1]
    found = answers(bank, rows, ids)
    for row, slot in enumerate(rows):
        expected = alone(model if slot == NO_SLOT else adapters[slot], ids[row])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)
