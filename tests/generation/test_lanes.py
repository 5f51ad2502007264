"""Every kind of model answers rows together, or one by one, as it answers each alone; none gives anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation.engine_lab import CPU, LIVELY, alone, ask, engine_of, family, ids, numbers, tiny
from peft import PeftConfig
from tiny_bases import write_base
from transformers import AutoModelForCausalLM, GenerationConfig
from tuning.method_zoo import reload, save_method

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.generation.lanes import lane_for
from peftkit.generation.seats import Alone
from peftkit.tuning.adapted import AdaptedModel
from peftkit.tuning.attachable import ATTACHABLE
from peftkit.tuning.prompted import PromptedModel
from peftkit.tuning.skeleton import skeleton

PREFIX = numbers(24, 99)
PROMPTS = [
    numbers(1, 1),
    PREFIX + numbers(5, 2),
    numbers(70, 3),
    PREFIX + numbers(1, 4),
    numbers(17, 5),
    PREFIX + numbers(20, 6),
]
TOGETHER = {
    "llama": lambda: family("llama"),
    "qwen2": lambda: family("qwen2", tie_word_embeddings=False),
    "qwen3": lambda: family("qwen3"),
    "gemma2: eager, soft caps, windows": lambda: family("gemma2", sliding_window=8),
    "gemma3: windows": lambda: family("gemma3_text", sliding_window=8, num_hidden_layers=6),
    "mistral: windows everywhere": lambda: tiny("MistralForCausalLM", sliding_window=8),
    "gpt2: learned positions": lambda: tiny("GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=2, n_positions=128),
    "gpt-neox": lambda: tiny("GPTNeoXForCausalLM"),
    "phi3": lambda: tiny("Phi3ForCausalLM"),
    "mixtral: experts": lambda: tiny("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss: sinks, experts": lambda: tiny("GptOssForCausalLM", num_local_experts=4, head_dim=32, sliding_window=8),
    "deepseek: low-rank keys": lambda: tiny(
        "DeepseekV3ForCausalLM", num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=32, first_k_dense_replace=1,
    ),
}  # fmt: skip
PROMPTED = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
ONE_BY_ONE = {
    "mamba: no keys": lambda: tiny("MambaForCausalLM", state_size=4),
    "qwen3-next: linear attention": lambda: tiny(
        "Qwen3NextForCausalLM", num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "bloom: no positions": lambda: tiny("BloomForCausalLM", n_layer=2, n_head=2),
    "openai-gpt: no cache": lambda: tiny("OpenAIGPTLMHeadModel", n_embd=64, n_layer=2, n_head=2, n_positions=128),
    "gpt-neo: local layers": lambda: tiny(
        "GPTNeoForCausalLM", num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8,
    ),
    "falcon: alibi": lambda: tiny("FalconForCausalLM", alibi=True),
    "roberta: an encoder": lambda: tiny("RobertaForCausalLM"),
    "bart: half an encoder-decoder": lambda: tiny(
        "BartForCausalLM", d_model=64, decoder_layers=2, encoder_layers=2, decoder_ffn_dim=96,
        decoder_attention_heads=2, encoder_attention_heads=2, init_std=0.2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lively"), seed=5, **LIVELY)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base)


def kind_of(model: Any) -> str:
    return type(lane_for(Alone(model), CPU, 0, 16)).__name__


def answers(model: Any, tokenizer: Tokenizer, prompts: Any = PROMPTS, new: int = 6, **limits: Any) -> list[list[int]]:
    engine = engine_of(model, tokenizer, **limits)
    tickets = [ask(engine, prompt, new) for prompt in prompts]
    engine.run()
    return [ids(ticket) for ticket in tickets]


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_of_different_length_go_together(name: str, tokenizer: Tokenizer) -> None:
    model = TOGETHER[name]()
    assert kind_of(model) == "Together"
    wanted = [alone(model, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in wanted}) > len(PROMPTS) - 2, "these answers cannot be told apart"
    assert answers(model, tokenizer) == wanted
    assert answers(model, tokenizer, rows=3, prompt_tokens=16) == wanted


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_keeps_no_rows_goes_one_by_one(name: str, tokenizer: Tokenizer) -> None:
    model = ONE_BY_ONE[name]()
    assert kind_of(model) == "OneByOne"
    assert answers(model, tokenizer) == [alone(model, prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_follow_the_longest_row_are_not_shared(kind: str, tokenizer: Tokenizer) -> None:
    """Such a model computes a batch by its longest row; beside a long prompt a short one is still itself."""
    scaled = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        scaled |= {"original_max_position_embeddings": 32, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    model = tiny("LlamaForCausalLM", rope_parameters=scaled, max_position_embeddings=32)
    short, long = numbers(9, 1), numbers(60, 2)
    assert kind_of(model) == "OneByOne"
    assert answers(model, tokenizer, [long, short])[1] == alone(model, short, 6)


def test_learned_positions_are_used_to_the_last_and_never_past_it(tokenizer: Tokenizer) -> None:
    """GPT-2 raises at a position it has not; the fill of a short row beside a long one must not reach there."""
    model = tiny("GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=2, n_positions=64)
    prompts = [numbers(63, 1), numbers(60, 2), numbers(63, 3)[:40] + numbers(22, 4), numbers(30, 5), numbers(1, 6)]
    engine = engine_of(model, tokenizer, positions=64, prompt_tokens=40)
    tickets = [ask(engine, prompt, 12) for prompt in prompts]
    engine.run()
    for ticket, prompt in zip(tickets, prompts, strict=True):
        new = min(12, 64 - len(prompt))
        assert ids(ticket) == alone(model, prompt, new)
        assert ticket.completion is not None
        assert ticket.completion.finish == "length"
        assert len(ids(ticket)) == new


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantized_and_16_bit_bases(bits: int, base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each token is the likeliest by a plain forward pass, up to the rounding of batched products."""
    backbone = load_backbone(
        BaseSpec(source=str(base)), QuantSpec.model_validate({"bits": bits, "device": "cpu"}), tmp_path
    )
    model = backbone.model
    assert kind_of(model) == "Together"
    for prompt, answer in zip(PROMPTS, answers(model, tokenizer, new=5), strict=True):
        assert len(answer) == 5
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.float().gather(1, torch.tensor(answer)[:, None])[:, 0]
        # bf16 keeps 8 bits; int8 rounds activations to 1/127 of their row's largest.
        room = logits.float().abs().amax(1) * 2**-6
        assert bool((chosen >= logits.float().amax(1) - room).all())


@pytest.mark.parametrize("method", sorted(ATTACHABLE))
def test_every_attachable_method_answers_as_it_generates_alone(
    method: str, base: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    folder = save_method(skeleton(plain), method, tmp_path / "adapter")
    oracle = reload(skeleton(plain), folder)
    with torch.random.fork_rng():
        kind = PromptedModel if method in PROMPTED else AdaptedModel
        model = kind(skeleton(plain), PeftConfig.from_pretrained(str(folder))).eval()
        model.load_adapter(str(folder), "default")
    assert kind_of(model) == ("OneByOne" if method in PROMPTED else "Together")
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=[2], pad_token_id=2)
    prompts = PROMPTS[:2] + PROMPTS[3:]
    theirs = [oracle.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    assert answers(model, tokenizer, prompts, new=4) == [[t for t in found if t != 2] for found in theirs]
