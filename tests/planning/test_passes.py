"""What a plan says of a step's passes, against what trying the model says, and the split that training makes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peftkit.planning.architecture import architecture
from peftkit.planning.families import FAMILIES
from peftkit.planning.passes import Passes, training_passes
from peftkit.planning.setting import Setting
from peftkit.planning.tokens import CPU_TOKENS, accumulates, labelled_tokens, micro_batch_tokens
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import split
from peftkit.training.passes.trying import find_paths
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

QUICK = ("falcon", "gpt2", "llama", "stablelm")


def small(name: str) -> Any:
    """The config of a tiny model of a family."""
    fields: dict[str, Any] = {"vocab_size": 259, "num_attention_heads": 4, "pad_token_id": 0}
    if name == "gpt2":
        fields = {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 4}
    elif name == "opt":
        fields |= {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
    else:
        fields |= {"hidden_size": 64, "num_hidden_layers": 2}
    if name not in ("falcon", "gpt2", "gpt_neox", "opt"):  # which call it otherwise, or have no such thing
        fields |= {"num_key_value_heads": 2, "intermediate_size": 128}
    if "moe" in name:
        fields |= {"moe_intermediate_size": 64}
    return CONFIG_MAPPING[name](**fields)


def found(name: str) -> tuple[Passes, Paths]:
    """What the config says, and what the model says when it is tried."""
    torch.manual_seed(0)
    config = small(name)
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    placed = SimpleNamespace(device=torch.device("cpu"), placement=SimpleNamespace(compute_dtype=torch.float32))
    tuned = Tuned(model, cast(Any, placed), AdapterSpec(method="lora", r=4), names=())
    return training_passes(architecture(config.to_dict()), Setting(r=4, longest=64)), find_paths(tuned)


@pytest.mark.parametrize("name", QUICK)
def test_the_config_says_what_trying_the_model_says(name: str) -> None:
    planned, tried = found(name)
    assert planned == Passes(tried.flat, scores_labels=tried.head is not None, fused=tried.fused)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QUICK)))
def test_every_familys_config_does(name: str) -> None:
    test_the_config_says_what_trying_the_model_says(name)


def test_what_takes_which_shortcuts() -> None:
    llama, mistral = (architecture(small(name).to_dict()) for name in ("llama", "mistral"))
    every = Passes(flat=True, scores_labels=True, fused=True)
    assert training_passes(llama, Setting()) == every
    for changes, expected in (
        ({"passes": "plain"}, Passes()),
        ({"passes": "padded"}, replace(every, flat=False)),
        ({"trunk_cache": True}, replace(every, flat=False)),
        ({"row_copies": 2}, Passes(fused=True)),
        ({"lora_dropout": 0.1}, replace(every, fused=False)),
        ({"method": "dora"}, replace(every, fused=False)),
        ({"method": "norms"}, replace(every, fused=False)),
        ({"method": "prefix_tuning"}, Passes()),
    ):
        assert training_passes(llama, Setting(**changes)) == expected, changes  # type: ignore[arg-type]
    window = mistral.window
    assert training_passes(mistral, Setting(longest=window)).flat
    assert not training_passes(mistral, Setting(longest=window + 1)).flat


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=24),
    st.sampled_from([1, 2, 8, 40]),
    st.sampled_from(["cpu", "cuda"]),
    st.booleans(),
)
def test_no_micro_batch_of_any_step_has_more_tokens_than_are_planned(
    rows: list[int], at_once: int, device: Any, flat: bool
) -> None:
    setting = Setting(
        micro_batch=at_once, rows_per_step=len(rows), longest=max(rows), labelled=max(rows), device=device
    )
    tokens = micro_batch_tokens(setting)
    batches = split(rows, tokens, flat=flat)
    assert max(sum(rows[index] for index in batch) for batch in batches) <= tokens == labelled_tokens(setting)
    if not accumulates(setting):
        assert len(batches) == 1


def test_tokens_of_a_step_by_hand() -> None:
    asked = Setting(micro_batch=4, rows_per_step=16, longest=300, labelled=30)
    assert (micro_batch_tokens(asked), labelled_tokens(asked), accumulates(asked)) == (1200, 120, True)
    on_cpu = replace(asked, device="cpu")
    assert (micro_batch_tokens(on_cpu), labelled_tokens(on_cpu)) == (CPU_TOKENS, -(-CPU_TOKENS // 10))
    assert not accumulates(replace(asked, micro_batch=16))
    assert accumulates(replace(on_cpu, micro_batch=16))
