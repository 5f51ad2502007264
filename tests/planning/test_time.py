"""FLOP per token against figures worked out by hand, seconds against published runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.planning.architecture import Architecture, architecture
from peftkit.planning.devices import DEVICES, find_device
from peftkit.planning.setting import Setting
from peftkit.planning.time import (
    Machine,
    Seconds,
    Workload,
    cpu,
    gpu,
    measuring_seconds,
    plan_time,
    step_seconds,
    training_flops,
)


def llama(layers: int, hidden: int, heads: int, kv: int, width: int, vocabulary: int, **more: Any) -> Architecture:
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": width,
        "vocab_size": vocabulary,
    }
    return architecture({"model_type": "llama", **shape, **more})


SMOLLM2 = llama(30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True)
N = 134_479_872
"""30 * (576*576*2 + 576*192*2 + 3*576*1536) + 49152*576: parameters in products."""
P8 = 2_442_240
"""30 * 8 * (2*(576+576) + 2*(576+192) + 3*(576+1536)): LoRA's parameters for r = 8."""


def rows_of(length: int, **fields: Any) -> Setting:
    return Setting(longest=length, labelled=length, in_place=fields.get("method") == "full", **fields)


def test_the_hand_count_is_the_architectures() -> None:
    assert SMOLLM2.linear_parameters + 49152 * 576 == N
    assert SMOLLM2.adapter_parameters(8) == P8


# Worked by hand: GFLOP per token of SmolLM2-135M, attention included. Full recomputation computes the head again too;
# checkpointing keeps the blocks' inputs and has no need to.
GFLOP = [
    ("full", 8, 128, False, 0.820),
    ("lora", 8, 128, False, 0.566),
    ("lora", 8, 128, True, 0.844),
]


@pytest.mark.parametrize(("method", "r", "length", "checkpointing", "gflop"), GFLOP)
def test_flop_per_token_of_smollm2(method: str, r: int, length: int, checkpointing: bool, gflop: float) -> None:
    setting = rows_of(length, method=method, r=r, gradient_checkpointing=checkpointing)
    again = 2 * 49152 * 576 if checkpointing else 0
    assert (training_flops(SMOLLM2, setting, length) + again) / 1e9 == pytest.approx(gflop, abs=5e-4)


@pytest.mark.parametrize(
    ("length", "r", "checkpointing", "ratio"),
    [
        (128, 8, False, 0.69),
        (128, 64, False, 0.815),
        (2048, 8, False, 0.75),
        (2048, 64, False, 0.851),
        (128, 8, True, 0.772),
        (2048, 8, True, 0.816),
        (128, 64, True, 0.897),
        (2048, 64, True, 0.917),
    ],
)
def test_lora_over_full_of_smollm2(length: int, r: int, checkpointing: bool, ratio: float) -> None:
    again = 2 * 49152 * 576 if checkpointing else 0
    lora, full = (
        training_flops(SMOLLM2, rows_of(length, method=method, r=r, gradient_checkpointing=checkpointing), length)
        + again
        for method in ("lora", "full")
    )
    assert lora / full == pytest.approx(ratio, abs=1e-3 if round(ratio, 2) != ratio else 5e-3)


def test_without_attention_full_is_6n_lora_4n_and_6p_and_checkpointing_adds_the_blocks_forward_pass() -> None:
    blocks = SMOLLM2.linear_parameters
    assert training_flops(SMOLLM2, rows_of(1, method="full"), 0) == 6 * N
    assert training_flops(SMOLLM2, rows_of(1, r=8), 0) == 4 * N + 6 * P8
    assert training_flops(SMOLLM2, rows_of(1, method="full", gradient_checkpointing=True), 0) == 6 * N + 2 * blocks
    again = 2 * blocks + 2 * P8
    assert training_flops(SMOLLM2, rows_of(1, r=8, gradient_checkpointing=True), 0) == 4 * N + 6 * P8 + again


def test_blocks_that_are_not_checkpointed_are_not_computed_again() -> None:
    setting = rows_of(512, r=8, gradient_checkpointing=True)
    flops = [training_flops(SMOLLM2, replace(setting, checkpointed_blocks=count), 512) for count in (None, 30, 15, 3)]
    none = training_flops(SMOLLM2, replace(setting, gradient_checkpointing=False), 512)
    assert flops[0] == flops[1]
    assert [each - none for each in flops[2:]] == pytest.approx([(flops[0] - none) / 2, (flops[0] - none) / 10])


def test_short_rows_go_through_together() -> None:
    """16 rows of 60 tokens are one pass where one row of 1,024 would be; each reads the weights, which is all here."""
    machine, rows = Machine(1e20, 1e9, launches=False), rows_of(1024, micro_batch=1, rows_per_step=16, optim="sgd")
    one, two, ten = (step_seconds(SMOLLM2, rows, machine, tokens).low for tokens in (60, 120, 600))
    assert one == step_seconds(SMOLLM2, replace(rows, rows_per_step=1), machine, 60).low
    assert ten - one == pytest.approx(9 * (two - one))  # 960, 1,920 and 9,600 tokens; the update is once


def test_the_head_counts_where_there_are_labels() -> None:
    every, tenth = Setting(longest=1000, labelled=1000, r=8), Setting(longest=1000, labelled=100, r=8)
    saved = training_flops(SMOLLM2, every, 0) - training_flops(SMOLLM2, tenth, 0)
    assert saved == pytest.approx(0.9 * 4 * 49152 * 576)


def test_a_frozen_trunk_costs_a_forward_pass_and_its_head() -> None:
    head, blocks = 49152 * 576, SMOLLM2.linear_parameters
    none, half, all_ = (rows_of(512, method="top_layers", top_layers=count) for count in (0, 15, 30))
    assert training_flops(SMOLLM2, none, 0) == 2 * N + 4 * head
    assert training_flops(SMOLLM2, half, 0) == 2 * N + 4 * head + 4 * blocks / 2
    assert training_flops(SMOLLM2, all_, 512) == training_flops(SMOLLM2, rows_of(512, method="full"), 512)


def test_blocks_below_the_lowest_trained_one_have_a_forward_pass_and_nothing_else() -> None:
    """LoRA in the top third of 30 layers, and in the tenth one alone: the backward pass goes down to it."""
    blocks, each = SMOLLM2.linear_parameters / 30, P8 / 30
    top = rows_of(1, r=8, layers=tuple(range(20, 30)))
    assert training_flops(SMOLLM2, top, 0) == pytest.approx(2 * N + 2 * (10 * blocks + 49152 * 576) + 6 * 10 * each)
    one = rows_of(1, r=8, layers=(9,), gradient_checkpointing=True)
    again = 2 * (21 * blocks + each)
    assert training_flops(SMOLLM2, one, 0) == pytest.approx(2 * N + 2 * (21 * blocks + 49152 * 576) + 6 * each + again)


def test_norms_cost_the_gradients_of_the_inputs_and_a_delta_weight_a_second_product() -> None:
    assert training_flops(SMOLLM2, rows_of(1, method="norms"), 0) == 4 * N
    assert training_flops(SMOLLM2, rows_of(1, method="loha", r=8), 0) == 4 * N + 6 * SMOLLM2.linear_parameters


def test_a_token_meets_the_experts_it_is_sent_to() -> None:
    config = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    mixtral = architecture(config)  # 46.7 B parameters, of which 12.9 B are used for a token (mistral.ai)
    assert mixtral.parameters / 1e9 == pytest.approx(46.7, abs=0.05)
    embedding = 32000 * 4096
    per_token = training_flops(mixtral, rows_of(1, method="full"), 0) / 6 + embedding
    assert per_token / 1e9 == pytest.approx(12.9, abs=0.05)


# --- seconds against published runs ----------------------------------------------------------------------------------

QWEN_7B = llama(32, 4096, 32, 32, 11008, 151936)
QWEN_2B = llama(24, 2048, 16, 16, 5504, 151936)
GEMMA_2B = llama(18, 2048, 8, 1, 16384, 256000, head_dim=256, tie_word_embeddings=True)
LLAMA2_7B = llama(32, 4096, 32, 32, 11008, 32000)
LLAMA2_13B = llama(40, 5120, 40, 40, 13824, 32000)
LLAMA31_8B = llama(32, 4096, 32, 8, 14336, 128256)
LLAMA32_3B = llama(28, 3072, 24, 8, 8192, 128256, head_dim=128, tie_word_embeddings=True)


@dataclass(frozen=True)
class Published:
    source: str
    base: Architecture
    card: str
    setting: Setting
    seconds: float
    """Of one optimizer step."""
    tokens_per_row: float | None = None

    @property
    def estimate(self) -> Seconds:
        return step_seconds(self.base, self.setting, gpu(find_device(self.card), "bfloat16"), self.tokens_per_row)

    @property
    def ratio(self) -> float:
        return self.seconds / self.estimate.expected

    @property
    def inside(self) -> bool:
        return self.estimate.low <= self.seconds <= self.estimate.high

    def __str__(self) -> str:
        setting, guess = self.setting, self.estimate
        what = f"{setting.method} {setting.bits} bit, {self.base.parameters / 1e9:.1f} B, {setting.longest} tokens"
        range_ = f"[{guess.low:.3g}, {guess.expected:.3g}, {guess.high:.3g}]"
        return f"{self.source}: {what}: {self.seconds:.3g} s, {range_}, × {self.ratio:.2f}" + " out" * (not self.inside)


def qwen(base: Architecture, length: int, seconds: float, **fields: Any) -> Published:
    setting = rows_of(length, micro_batch=1, rows_per_step=8, r=64, gradient_checkpointing=True, **fields)
    return Published("Qwen README", base, "A100 80GB", setting, seconds)


FITTED = [
    qwen(QWEN_7B, length, seconds, bits=bits)
    for bits, row in ((16, (1.2, 1.5, 2.8, 5.2, 10.1, 21.3)), (4, (3.0, 3.0, 3.5, 7.0, 11.6, 22.3)))
    for length, seconds in zip((256, 512, 1024, 2048, 4096, 8192), row, strict=True)
]


def llama_factory(base: Architecture, tokens_per_s: float, bits: int, method: str = "lora") -> Published:
    """Table 4 of the paper: 512 tokens a step on an A100 40 GB."""
    fields: Any = {"bits": bits, "method": method, "r": 128, "optim": "adamw_8bit", "gradient_checkpointing": True}
    setting = rows_of(512, micro_batch=1, rows_per_step=1, **fields)
    return Published("LLaMA-Factory paper", base, "A100 40GB", setting, 512 / tokens_per_s)


def llama_factory_wiki(tokens_per_s: float, bits: int) -> Published:
    fields: Any = {"bits": bits, "r": 8, "gradient_checkpointing": True}
    setting = rows_of(1024, micro_batch=4, rows_per_step=8, **fields)
    return Published("LLaMA-Factory wiki", LLAMA2_7B, "A100 40GB", setting, 8192 / tokens_per_s)


def torchtune(tokens_per_s: float, bits: int, method: str = "lora") -> Published:
    optim = "adamw_8bit" if method == "full" else "adamw_torch"
    fields: Any = {"bits": bits, "method": method, "r": 8, "gradient_checkpointing": True, "optim": optim}
    setting = rows_of(2048, micro_batch=2, rows_per_step=2, **fields)
    return Published("torchtune", LLAMA31_8B, "RTX 4090", setting, 4096 / tokens_per_s)


def peft(seconds: float, method: str, r: int, targets: Any) -> Published:
    """Method comparison: 5,000 steps of 4 rows, 4,198,051 tokens in all, no checkpointing."""
    fields: Any = {"bits": 16, "method": method, "r": r, "target_modules": targets}
    setting = rows_of(768, micro_batch=4, rows_per_step=4, **fields)
    return Published("PEFT", LLAMA32_3B, "L40S", setting, seconds / 5000, 4_198_051 / 20_000)


QV = ("q_proj", "v_proj")
SCORED = [
    qwen(QWEN_2B, 256, 1.0, bits=16),
    qwen(QWEN_2B, 8192, 6.8, bits=16),
    qwen(QWEN_2B, 256, 1.4, bits=4),
    qwen(QWEN_2B, 8192, 6.5, bits=4),
    qwen(QWEN_2B, 256, 2.1, bits=16, method="full"),
    qwen(QWEN_2B, 8192, 5.6, bits=16, method="full"),
    llama_factory(GEMMA_2B, 3090, 16, "full"),
    llama_factory(GEMMA_2B, 3521, 16),
    llama_factory(GEMMA_2B, 3159, 4),
    llama_factory(LLAMA2_7B, 1335, 16, "full"),
    llama_factory(LLAMA2_7B, 1954, 16),
    llama_factory(LLAMA2_7B, 1579, 4),
    llama_factory(LLAMA2_13B, 1468, 16),
    llama_factory(LLAMA2_13B, 974, 4),
    *(llama_factory_wiki(rate, bits) for rate, bits in ((2392, 16), (2954, 16), (4007, 16), (2415, 4), (3726, 4))),
    # The same table has an "A6000" at 4,699 tokens/s: 222 TFLOP/s with checkpointing, and the card's peak is 155.
    torchtune(1650, 16, "full"),
    torchtune(3083, 16),
    torchtune(2413, 4),
    peft(942, "lora", 32, QV),
    peft(967, "lora", 64, QV),
    peft(1050, "lora", 10, ("gate_proj", "up_proj", "down_proj")),
    peft(2147, "full", 32, "all-linear"),
]


def test_the_constants_reproduce_the_source_they_were_fitted_on() -> None:
    table = "\n".join(map(str, FITTED))
    assert all(row.inside for row in FITTED), table
    assert all(0.85 <= row.ratio <= 1.25 for row in FITTED), table


def test_most_published_runs_that_no_constant_was_fitted_on_lie_in_the_bracket() -> None:
    table = "\n".join(map(str, SCORED))
    inside = sum(row.inside for row in SCORED)
    assert len(SCORED) == 26
    # Four rows are slower than the slowest estimate: small micro-batches on hosts that start kernels more slowly.
    assert inside >= 22, f"{inside} of {len(SCORED)} inside\n{table}"
    assert all(0.5 <= row.ratio <= 2.5 for row in SCORED), table


RATIOS = [
    # QLoRA over LoRA: nothing to see where there are many tokens a step, more where there are few
    (qwen(QWEN_2B, 8192, 6.5, bits=4), qwen(QWEN_2B, 8192, 6.8, bits=16)),
    (qwen(QWEN_2B, 256, 1.4, bits=4), qwen(QWEN_2B, 256, 1.0, bits=16)),
    (torchtune(2413, 4), torchtune(3083, 16)),
    (llama_factory(GEMMA_2B, 3159, 4), llama_factory(GEMMA_2B, 3521, 16)),
    (llama_factory(LLAMA2_7B, 1579, 4), llama_factory(LLAMA2_7B, 1954, 16)),
    (llama_factory(LLAMA2_13B, 974, 4), llama_factory(LLAMA2_13B, 1468, 16)),
    # full over LoRA
    (qwen(QWEN_2B, 256, 2.1, bits=16, method="full"), qwen(QWEN_2B, 256, 1.0, bits=16)),
    (qwen(QWEN_2B, 8192, 5.6, bits=16, method="full"), qwen(QWEN_2B, 8192, 6.8, bits=16)),
    (torchtune(1650, 16, "full"), torchtune(3083, 16)),
    (llama_factory(LLAMA2_7B, 1335, 16, "full"), llama_factory(LLAMA2_7B, 1954, 16)),
    (peft(2147, "full", 32, "all-linear"), peft(942, "lora", 32, QV)),
    # a larger adapter
    (peft(967, "lora", 64, QV), peft(942, "lora", 32, QV)),
]


def test_ratios_of_two_published_runs_of_one_source_are_estimated_within_a_factor_of_two() -> None:
    lines, factors = [], []
    for one, other in RATIOS:
        published, estimated = one.seconds / other.seconds, one.estimate.expected / other.estimate.expected
        factors.append(max(published / estimated, estimated / published))
        lines.append(f"published {published:.2f}, estimated {estimated:.2f}, × {factors[-1]:.2f}: {one}; over {other}")
    # Unsloth's kernels unpack four times as fast as those of the source of the constants: 1.24 is estimated as 2.49.
    assert all(factor <= 2.01 for factor in factors), "\n".join(lines)
    assert sorted(factors)[len(factors) // 2] <= 1.5, "\n".join(lines)


# --- what must hold whatever the constants are -----------------------------------------------------------------------

settings = st.builds(
    Setting,
    bits=st.sampled_from([4, 8, 16]),
    method=st.sampled_from(["lora", "rslora", "dora"]),
    r=st.sampled_from([4, 16, 64]),
    rows_per_step=st.just(16),
    micro_batch=st.sampled_from([1, 2, 4, 8]),
    gradient_checkpointing=st.booleans(),
    activation_offloading=st.booleans(),
    longest=st.sampled_from([64, 512, 4096]),
    labelled=st.just(64),
)
machines = st.sampled_from([*(gpu(card, "bfloat16") for card in DEVICES), cpu(100e9, 20e9)])
WORK = Workload(steps=10, tokens_per_row=60, passes=2, held_out_rows=50, held_out_tokens=60, answers=20)


@given(settings, machines)
def test_the_three_figures_are_ordered_and_add_up(setting: Setting, machine: Any) -> None:
    plan = plan_time(LLAMA32_3B, setting, machine, WORK)
    for each in (plan.step, plan.measuring, plan.total):
        assert 0 < each.low <= each.expected <= each.high
    assert plan.total.expected == pytest.approx(10 * plan.step.expected + plan.measuring.expected)


@given(settings, machines)
def test_concessions_cost_time_and_larger_micro_batches_do_not(setting: Setting, machine: Any) -> None:
    def seconds(**changes: Any) -> float:
        return step_seconds(LLAMA32_3B, replace(setting, **changes), machine, 60).expected

    here = seconds() * (1 - 1e-9)
    if not setting.activation_offloading:  # with checkpointing there is less to move
        assert seconds(gradient_checkpointing=True) >= here
    assert seconds(activation_offloading=True) >= here
    assert seconds(micro_batch=2 * setting.micro_batch) <= seconds() * (1 + 1e-9)
    assert seconds(bits=4) >= seconds(bits=16) * (1 - 1e-9)


def test_without_rows_an_evaluation_takes_no_time() -> None:
    machine = gpu(find_device("RTX 3060 12GB"), "bfloat16")
    assert measuring_seconds(SMOLLM2, Setting(), machine, Workload(10, 100.0)) == Seconds(0, 0, 0)


def test_decoding_one_row_cannot_beat_reading_the_packed_weights_for_every_token() -> None:
    setting = Setting(bits=4, evaluation_batch=1, evaluation_longest=16, max_new_tokens=100)
    machine = gpu(find_device("RTX 3060 12GB"), "bfloat16")
    seconds = measuring_seconds(LLAMA31_8B, setting, machine, Workload(0, 0.0, 1, answers=1)).low
    packed = 6_979_321_856 / 2 + 2 * (128256 * 4096 * 2 + 65 * 4096)  # 224 linear layers; embedding, head, norms
    assert 100 * packed / 360e9 <= seconds <= 110 * packed / 360e9


def test_a_cpu_is_as_fast_as_its_measured_products() -> None:
    """230 tokens/s were measured for LoRA over SmolLM2 on two cores (benchmarks/results/three_precisions.jsonl)."""
    setting = rows_of(57, bits=16, compute_dtype="float32", micro_batch=4, rows_per_step=8, device="cpu")
    step = step_seconds(SMOLLM2, setting, cpu(150e9, 20e9), 27143 / 480)
    assert step.low <= 27143 / 60 / 230.4 <= step.high
