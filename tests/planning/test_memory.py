"""The memory plan against hand-worked figures, bitsandbytes' own tensors, and what autograd really saves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peftkit.backbone.quantize import quantize
from peftkit.data.chat import IGNORED, Example
from peftkit.evaluation.held_out import ANSWERS_PER_ROW
from peftkit.generation.forward import LOGITS_BYTES, row_nll
from peftkit.generation.limits import Limits
from peftkit.generation.rows import rounded
from peftkit.planning import evaluation as planned
from peftkit.planning import head
from peftkit.planning.activations import activations
from peftkit.planning.architecture import architecture
from peftkit.planning.backward import Backward
from peftkit.planning.evaluation import measuring
from peftkit.planning.head import chunk_rows
from peftkit.planning.memory import Range, exactly, plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.tape import Tape
from peftkit.planning.weights import trained_parameters, weights
from peftkit.training.ledger import Ledger
from peftkit.training.passes import head as passes_head
from peftkit.training.passes.head import Head
from peftkit.training.passes.paths import Paths
from peftkit.training.regularize.losses import TokenLoss

MODELS = json.loads((Path(__file__).parents[2] / "benchmarks" / "published_memory.json").read_text())["models"]
SMOLLM2 = architecture(MODELS["smollm2-135m"])
CPU = Setting(device="cpu", dtype="float32", compute_dtype="float32", bits=32)
TINY = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def test_block_quantization_by_hand() -> None:
    """methods-and-oracles, section 2.2: codes 53.08 MB, constants 1.69 or 6.64 MB, 4.12703 bits per parameter."""
    plan = plan_memory(SMOLLM2, Setting())
    codes, constants = (plan.part(name).bytes.expected for name in ("linear layers", "quantization constants"))
    assert codes == 53_084_160
    assert constants == 1_685_880
    assert 8 * (codes + constants) / SMOLLM2.linear_parameters == pytest.approx(4.12703, abs=5e-6)
    single = plan_memory(SMOLLM2, Setting(double_quant=False))
    assert single.part("quantization constants").bytes.expected == 106_168_320 // 64 * 4
    total = codes + constants + 2 * (SMOLLM2.parameters - SMOLLM2.linear_parameters)
    assert total == pytest.approx(111.5e6, rel=5e-4)
    assert total + 2 * (SMOLLM2.parameters - SMOLLM2.linear_parameters) == pytest.approx(168.2e6, rel=5e-4)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (130, 257)])
def test_codes_and_constants_are_those_of_bitsandbytes(shape: tuple[int, int], double_quant: bool) -> None:
    base = replace(SMOLLM2, linears=(replace(SMOLLM2.linears[0], out=shape[0], into=shape[1], count=1),))
    parts = {part.name: part.bytes.expected for part in weights(base, Setting(double_quant=double_quant))}
    real = quantize(torch.randn(*shape), double_quant=double_quant)
    tensors = [real.state.absmax] + ([real.state.state2.absmax, real.state.offset] if double_quant else [])
    assert parts["linear layers"] == real.packed.numel()
    assert parts["quantization constants"] == sum(each.numel() * each.element_size() for each in tensors)


def test_adapter_gradients_and_optimizer_by_hand() -> None:
    count = 16 * 30 * (2 * 1152 + 2 * 768 + 3 * 2112)
    plan = plan_memory(SMOLLM2, Setting())
    assert [plan.part(name).bytes.expected for name in ("adapter", "gradients", "optimizer")] == [
        4 * count, 4 * count, 8 * count]  # fmt: skip
    small = 16 * 30 * 2 * 192  # B of keys and values: 3,072 entries each, fewer than 4,096
    eight = plan_memory(SMOLLM2, Setting(optim="adamw_8bit")).part("optimizer").bytes.expected
    assert eight == 8 * small + (2 + 2 * 4 / 256) * (count - small)  # two states, a float32 for 256 entries of each
    # Every tensor of rank 1 has fewer than 4,096 entries, and stays in 32 bits.
    assert plan_memory(SMOLLM2, Setting(optim="adamw_8bit", r=1)).part("optimizer").bytes.expected == 8 * count // 16
    assert plan_memory(SMOLLM2, Setting(optim="sgd")).part("optimizer").bytes == exactly(0)


def test_a_full_fine_tune_holds_weights_gradients_and_states_of_everything() -> None:
    setting = replace(CPU, method="full", in_place=True)
    assert trained_parameters(SMOLLM2, setting) == SMOLLM2.parameters
    plan = plan_memory(SMOLLM2, setting)
    assert plan.part("gradients").bytes.expected + plan.part("optimizer").bytes.expected == 12 * SMOLLM2.parameters
    assert plan.stage("train").bytes.expected > 16 * SMOLLM2.parameters


def test_logits_and_cache_by_hand() -> None:
    setting = replace(CPU, labelled=100, micro_batch=2, longest=128, gradient_checkpointing=True)
    plan = plan_memory(SMOLLM2, replace(setting, passes="plain"))
    assert plan.part("logits").bytes.expected == pytest.approx(12 * 2 * 100 * 49152, rel=0.02)
    states = 4 * 2 * 100 * 576  # what the head reads, and the gradient of that
    assert plan_memory(SMOLLM2, setting).part("logits").bytes.expected == 4 * 2 * 100 * 49152 + 2 * states
    cache = plan_memory(SMOLLM2, replace(CPU, evaluation_batch=4, evaluation_longest=96, max_new_tokens=32))
    assert cache.part("KV cache").bytes.expected == 3 * 4 * 128 * 30 * 2 * 192 * 4
    longer = plan_memory(SMOLLM2, replace(CPU, evaluation_batch=4, evaluation_longest=97, max_new_tokens=32))
    assert longer.part("KV cache").bytes.expected == 3 * 4 * 192 * 30 * 2 * 192 * 4  # rows grow by 64 tokens


def test_logits_of_many_tokens_need_no_more_than_a_chunk() -> None:
    """16-bit logits have a float32 copy besides, and their slope in 16 bits.

    Only what the head reads, and the gradient of that, grow with the tokens.
    """
    assert head.LOGITS_BYTES == passes_head.LOGITS_BYTES
    rows = chunk_rows(49152)
    assert rows == passes_head.Head(torch.nn.Identity(), 49152).rows == 341
    for compute, per_logit in (("float32", 4), ("bfloat16", 8)):
        setting = Setting(compute_dtype=compute, dtype=compute, longest=2048, labelled=2048, micro_batch=1)
        size = 2 if compute == "bfloat16" else 4
        plans = [plan_memory(SMOLLM2, replace(setting, micro_batch=count)).part("logits").bytes for count in (1, 3)]
        for count, found in zip((1, 3), plans, strict=True):
            assert found.expected == per_logit * rows * 49152 + 2 * size * count * 2048 * 576


def test_the_plan_knows_how_answers_are_generated() -> None:
    """Planning may not import what generates: the figures stand there twice."""
    assert planned.LOGITS_BYTES == LOGITS_BYTES
    assert planned.ANSWERS_PER_ROW == ANSWERS_PER_ROW
    assert Limits().prompt_tokens == planned.PROMPT_TOKENS
    assert Limits().prefix_bytes == planned.PREFIX_BYTES
    assert planned._rounded(65) == rounded(65) == 128


def test_a_backward_pass_by_hand() -> None:
    """y = a * x twice, then a sum: one saved tensor each, and one gradient at a time."""
    tape = Tape()
    x = tape.fresh(10, 4, needs_grad=True)
    tape.begin(False, x)
    first = tape.like(x, saves=[x])
    tape.begin(False, first)
    second = tape.like(first, saves=[first])
    tape.begin(False, second)
    loss = tape.op([second], 1, 4)
    trace = Backward(tape, gradients_are_there=False).walk(loss, held=0)
    assert trace.kept == 80
    assert trace.head == 80 + 4 + 40  # the loss's gradient, and second's
    assert trace.block == 80 + 40 + 40
    assert trace.bottom == 40 + 40 + 40


def test_gradients_that_meet_are_summed_in_new_memory() -> None:
    """What linear layers send are views, which take no sum: the head's gradient, the embedding's, and their sum."""
    tape = Tape()
    weight = tape.weight(100, 4, uses=2)
    first = tape.op([weight], 1, 4)
    tape.begin(False, first)
    second = tape.like(first)
    tape.begin(False, second)
    loss = tape.op([second, weight], 1, 4)
    trace = Backward(tape, gradients_are_there=False).walk(loss, held=0)
    assert trace.bottom == 3 * 400


def test_checkpointing_asks_for_no_gradient_at_the_embedding() -> None:
    """The first block's input is kept, and in GPT-2 that is the sum with the positions: the words' alone is gone."""
    gpt2 = architecture({"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 259,
                         "n_positions": 128})  # fmt: skip
    setting = replace(CPU, micro_batch=2, longest=96, labelled=95, gradient_checkpointing=True)
    learned, plain = (
        activations(replace(gpt2, position_parameters=each), setting).kept for each in (gpt2.position_parameters, 0)
    )
    assert learned == plain


def test_layers_that_slide_have_masks_for_rows_beyond_their_window() -> None:
    config = {**TINY, "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 64}
    base = architecture(config)
    setting = replace(CPU, micro_batch=2, longest=96, labelled=95, passes="padded")
    beyond, within = (activations(replace(base, window=each), setting).kept for each in (64, 96))
    numbers, shared = 2 * 96 * 96 * 4, 2 * 96 * 96
    per_head = 2 * 2 * 96 * (4 - 2) * 16 * 4  # keys and values are repeated for the query heads
    assert beyond - within == 5 * (numbers + per_head) + shared * 5 // 6


def test_measuring_held_out_rows_needs_what_the_ledger_counts() -> None:
    config = CONFIG_MAPPING["llama"](**TINY)
    base, model = architecture(config.to_dict()), AutoModelForCausalLM.from_config(config).eval()
    for labelled in (95, 1):  # the logits need more, and then the blocks
        ids = [7] * 96
        rows = [Example(ids, [IGNORED] * (96 - labelled) + ids[96 - labelled :], 1, i, f"made:{i}") for i in range(4)]
        with Ledger(model) as ledger:
            row_nll(model, rows, pad_id=0, device=torch.device("cpu"))
        setting = replace(
            CPU, method="full", in_place=True, longest=96, labelled=labelled, evaluation_batch=4, evaluation_longest=96
        )
        assert measuring(base, setting).expected == pytest.approx(ledger.account().peak, rel=0.05)


def saved(model: Any, rows: int, length: int, paths: Paths) -> int:
    """Bytes of the storages that autograd keeps after a forward pass, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 259, (rows, length)).tolist()
    made = [Example(row, row, 1, index, f"made:{index}") for index, row in enumerate(ids)]
    laid = paths.laid(model, made, flat=paths.flat, pad_id=0, device=torch.device("cpu"))
    with paths.around(model), laid as batch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TokenLoss()(model, batch, paths)
    return sum(kept.values())


@pytest.mark.parametrize("passes", ["plain", "flat"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "olmo2", "phi3", "stablelm", "gpt2", "opt"])
def test_kept_activations_are_what_autograd_saves(name: str, method: str, passes: Literal["plain", "flat"]) -> None:
    changes: dict[str, Any] = dict(TINY)
    if name in ("gemma", "qwen3"):
        changes["head_dim"] = 16
    elif name == "gpt2":
        changes = {"vocab_size": 259, "n_embd": 64, "n_layer": 4, "n_head": 4, "resid_pdrop": 0, "attn_pdrop": 0,
                   "embd_pdrop": 0}  # fmt: skip
    elif name == "opt":
        changes |= {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0, "num_key_value_heads": 4}
    elif name == "phi3":
        changes["pad_token_id"] = 0
    config = CONFIG_MAPPING[name](**changes)
    model = AutoModelForCausalLM.from_config(config).train().requires_grad_(method == "full")
    if method == "lora":
        transposed = name == "gpt2"
        spec = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed)
        model = get_peft_model(model, spec)
    setting = replace(CPU, method=method, in_place=method == "full", r=8, micro_batch=2, rows_per_step=2, longest=96)
    setting = replace(setting, labelled=95, passes=passes)
    found = activations(architecture(config.to_dict()), setting)
    # Ids, mask and labels are alive, though autograd does not save them all.
    paths, loss = Paths(), 4 * 2 * 95 * 259  # the log-softmax
    if passes == "flat":  # gradients of what the head reads, and of its weight; the model's own, empty, product with it
        scored = Head(model.get_base_model().lm_head if method == "lora" else model.lm_head, 259)
        paths = Paths(scored, keeps_some=True, flat=name != "stablelm", fused=method == "lora")
        loss = 4 * 64 * (2 * 95 + 2 * 95 + 259 if method == "full" else 2 * 95)
    assert saved(model, 2, 96, paths) == pytest.approx(found.kept + loss, rel=0.01)


EXAMPLES = st.builds(
    Setting,
    bits=st.sampled_from([4, 8, 16]),
    compute_dtype=st.sampled_from(["float32", "bfloat16"]),
    method=st.sampled_from(["lora", "dora", "full"]),
    r=st.integers(1, 64),
    lora_dropout=st.sampled_from([0.0, 0.1]),
    micro_batch=st.integers(1, 8),
    gradient_checkpointing=st.booleans(),
    optim=st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "sgd"]),
    longest=st.integers(8, 2048),
    labelled=st.integers(1, 2048),
    evaluation_batch=st.integers(1, 16),
    device=st.sampled_from(["cuda", "cpu"]),
)
BASES = st.sampled_from(
    [architecture(MODELS[name]) for name in ("smollm2-135m", "gemma-2b", "phi-1.5", "llama-3.1-8b")]
)


@settings(max_examples=30, deadline=None)
@given(base=BASES, setting=EXAMPLES)
def test_more_work_never_needs_less_memory(base: Any, setting: Setting) -> None:
    here = plan_memory(base, setting).stage("train").bytes
    assert 0 < here.low <= here.expected <= here.high
    more = [
        replace(setting, micro_batch=setting.micro_batch + 1, rows_per_step=max(setting.rows_per_step, 9)),
        # A CPU takes fewer rows at once where they are longer, and so fewer labels if each row has as many.
        replace(setting, longest=setting.longest + 64, labelled=setting.labelled + 64),
        replace(setting, labelled=setting.labelled + 64),
        replace(setting, r=setting.r + 1),
    ]
    for bigger in more:
        assert plan_memory(base, bigger).stage("train").bytes.expected >= here.expected


@settings(max_examples=30, deadline=None)
@given(base=BASES, setting=EXAMPLES)
def test_checkpointing_keeps_less_and_fewer_bits_weigh_less(base: Any, setting: Setting) -> None:
    kept = [activations(base, replace(setting, gradient_checkpointing=each)).kept for each in (True, False)]
    assert kept[0] <= kept[1]
    sizes = []
    for bits in (4, 8, 16):
        parts = weights(base, replace(setting, bits=bits, method="lora"))
        sizes.append(sum(part.bytes.expected for part in parts))
    assert sizes[0] <= sizes[1] <= sizes[2]


@settings(max_examples=30, deadline=None)
@given(base=BASES, setting=EXAMPLES)
def test_concessions_never_need_more_memory(base: Any, setting: Setting) -> None:
    """What `fit` leaves out because a later concession does not fit either must not fit."""

    def high(changed: Setting) -> int:
        return max(stage.bytes.high for stage in plan_memory(base, changed).stages)

    optims = [high(replace(setting, optim=each)) for each in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")]
    assert optims == sorted(optims, reverse=True)
    assert high(replace(setting, activation_offloading=True)) <= high(setting)
    # Only what rests: a step needs more, since 8-bit layers keep their inputs and what 4-bit ones return is copied.
    plans = [plan_memory(base, replace(setting, bits=each, method="lora", device="cuda")) for each in (16, 8, 4)]
    loads = [plan.stage("load").bytes.high for plan in plans]
    assert loads == sorted(loads, reverse=True)


def test_the_file_stays_mapped_where_a_process_uses_its_tensors() -> None:
    base, nf4 = replace(SMOLLM2, stored=4), replace(CPU, bits=4)
    assert plan_memory(base, nf4).part("mapped file").bytes == Range(0, 106_168_320 * 4, 106_168_320 * 4)
    for other in (replace(nf4, bits=32), replace(nf4, dtype="bfloat16"), replace(nf4, device="cuda")):
        assert plan_memory(base, other).part("mapped file").bytes == exactly(0)


def test_rows_of_different_lengths_need_masks_where_they_stand_side_by_side() -> None:
    setting = Setting(micro_batch=4, longest=256, labelled=8)
    for passes, needs_more in (("flat", False), ("padded", True)):
        kept = plan_memory(SMOLLM2, replace(setting, passes=passes)).part("activations").bytes  # type: ignore[arg-type]
        assert (kept.high > kept.expected) is needs_more


def test_int8_layers_keep_their_inputs_under_checkpointing() -> None:
    setting = replace(CPU, micro_batch=1, longest=256, gradient_checkpointing=True)
    plain, eight = (activations(SMOLLM2, replace(setting, bits=bits)).kept for bits in (32, 8))
    # Every block holds the inputs of q/k/v, o, gate/up and down: three of the hidden size and one of the MLP's. The
    # first block's q/k/v have no graph, for their input has no gradient.
    assert eight - plain == (30 * (3 * 576 + 1536) - 576) * 256 * 4


def test_paged_states_may_leave_the_device() -> None:
    part = plan_memory(SMOLLM2, Setting(optim="paged_adamw_8bit", r=512)).part("optimizer")
    assert part.bytes.low < part.bytes.expected


def test_seventy_billion_parameters_from_the_config_alone() -> None:
    base = architecture(MODELS["llama-3.1-70b"])
    plan = plan_memory(base, Setting(gradient_checkpointing=True, longest=2048, labelled=2048, evaluation_batch=1))
    assert plan.limit.name == "train"
    assert 40e9 < plan.peak.expected < 52e9


def test_a_plan_can_be_kept_and_shown() -> None:
    plan = plan_memory(SMOLLM2, Setting())
    record = json.loads(json.dumps(plan.as_record()))
    assert record["limit"] == plan.limit.name
    assert {stage["name"] for stage in record["stages"]} == {"load", "train", "evaluate", "save", "merge"}
    assert all(len(row) == 5 for row in plan.rows())
    assert Range(1, 2, 3) + exactly(1) == Range(2, 3, 4)
