"""A skeleton computes what its model does, shares every tensor, and can be changed without the model noticing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peftkit.errors import TuningError
from peftkit.tuning.skeleton import places, skeleton

IDS = torch.tensor([[1, 5, 6, 7]])
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_layer": 2, "n_embd": 64, "n_head": 2, "rotary_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gptj": GPT,
    "gpt_neox": SIZES,
    "bloom": {**SIZES, "n_layer": 2, "n_head": 2},
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64},
    **{
        name: {**SIZES, "num_key_value_heads": 1, "head_dim": 32}
        for name in ("llama", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "lfm2")
    },
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_architecture(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TOKENS, **MODELS[kind])).eval()
    expected = logits(model)
    twin = skeleton(model)
    assert torch.equal(logits(twin), expected)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
    originals = {id(tensor) for _, _, tensor in places(model)}
    assert all(id(tensor) in originals for _, _, tensor in places(twin))
    for held, name, tensor in list(places(twin)):
        if isinstance(tensor, nn.Parameter):
            held[name] = nn.Parameter(torch.full_like(tensor, 0.25))
    assert not torch.allclose(logits(twin), expected, atol=1e-3)
    assert torch.equal(logits(model), expected)


def test_after_hidden_states_and_generation(load: Callable[..., Any]) -> None:
    """transformers hangs hooks and functions on a model when it is first used this way."""
    model = load(bits=4).model
    with torch.no_grad():
        before = model(input_ids=IDS, output_hidden_states=True).hidden_states
        model.generate(input_ids=IDS, max_new_tokens=2, eos_token_id=None)
        twin = skeleton(model)
        after = twin(input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


class _Bound(nn.Module):
    """A model that keeps a bound method, as some architectures keep the attention they chose."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.chosen = self.run

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_what_points_into_the_model_points_into_the_skeleton() -> None:
    model = _Bound()
    twin = skeleton(model)
    assert isinstance(twin.chosen, MethodType)
    assert twin.chosen.__self__ is twin
    twin.layer = nn.Linear(2, 2)
    assert torch.equal(model.chosen(torch.ones(2)), model.layer(torch.ones(2)))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = _Bound()
    model.lock = threading.Lock()
    with pytest.raises(TuningError, match="cannot be copied"):
        skeleton(model)
