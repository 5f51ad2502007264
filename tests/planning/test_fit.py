"""What a setting gives up to fit: never the effective batch, never rows without consent, never what is to stay."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import TrainingError
from peftkit.planning.architecture import Architecture, architecture
from peftkit.planning.concessions import choices
from peftkit.planning.devices import find_device, usable
from peftkit.planning.fit import Fit, fit
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.time import gpu, step_seconds

GB = 10**9
CARD = gpu(find_device("RTX 3060 12GB"), "bfloat16")


def llama(layers: int, hidden: int, heads: int, kv: int, width: int, vocabulary: int) -> Architecture:
    return architecture(
        {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "intermediate_size": width,
            "vocab_size": vocabulary,
        }
    )


LLAMA_1B = llama(16, 2048, 32, 8, 8192, 32000)
LLAMA_8B = llama(32, 4096, 32, 8, 14336, 128256)
LLAMA_70B = llama(80, 8192, 64, 8, 28672, 128256)


def high(base: Architecture, setting: Setting) -> int:
    return max(stage.bytes.high for stage in plan_memory(base, setting).stages)


def order(base: Architecture, asked: Setting, setting: Setting) -> tuple[Any, ...]:
    """What `fit` promises to put first, written a second time: fewer kinds of concession, then less time."""
    optims = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
    optim = 0 if setting.optim == asked.optim else optims.index(setting.optim)
    seconds = step_seconds(base, setting, CARD).expected
    return -setting.bits, setting.activation_offloading, optim, float(f"{seconds:.6g}")


def grid(asked: Setting, layers: int = 1) -> list[Setting]:
    """Every setting that `fit` may answer with, with the least evaluation batch."""
    micro_batches = [count for count in range(1, asked.rows_per_step + 1) if asked.rows_per_step % count == 0]
    optims = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] if asked.optim == "adamw_torch" else [asked.optim]
    optims += ["paged_adamw_8bit"] if asked.optim == "adamw_8bit" else []
    bits = [count for count in (16, 8, 4) if count <= asked.bits] if asked.method != "full" else [asked.bits]
    names = ("micro_batch", "optim", "activation_offloading", "bits", "gradient_checkpointing", "checkpointed_blocks")
    blocks = [(False, None), (True, None), *((True, count) for count in range(1, layers))]
    settings: list[Setting] = []
    for *each, again in itertools.product(micro_batches, optims, [False, True], bits, blocks):
        values: dict[str, Any] = dict(zip(names, (*each, *again), strict=True))
        settings.append(replace(asked, evaluation_batch=1, **values))
    return settings


bases = st.builds(
    llama,
    st.integers(2, 24),
    st.sampled_from([256, 1024, 2048]),
    st.just(8),
    st.sampled_from([2, 8]),
    st.sampled_from([1024, 5632]),
    st.sampled_from([1000, 32000, 150000]),
)
ways = st.sampled_from([("lora", 4), ("lora", 8), ("lora", 16), ("dora", 16), ("full", 16)])
askings = st.builds(
    lambda way, **fields: Setting(method=way[0], in_place=way[0] == "full", bits=way[1], **fields),
    ways,
    r=st.sampled_from([4, 64]),
    rows_per_step=st.sampled_from([1, 2, 6, 7, 16]),
    micro_batch=st.sampled_from([1, 2]),
    gradient_checkpointing=st.booleans(),
    optim=st.sampled_from(["adamw_torch", "adamw_8bit", "sgd"]),
    longest=st.sampled_from([33, 512, 2048]),
    labelled=st.sampled_from([1, 33]),
    evaluation_batch=st.sampled_from([1, 4, 16]),
    evaluation_longest=st.sampled_from([64, 2048]),
)
shares = st.floats(0.2, 1.2)
"""Budget over what the setting needs as it was asked for."""
NAMES = [
    "micro_batch",
    "gradient_checkpointing",
    "checkpointed_blocks",
    "optim",
    "activation_offloading",
    "bits",
    "evaluation_batch",
]
fixings = st.frozensets(st.sampled_from(NAMES), max_size=3)


@settings(max_examples=15, deadline=None)
@given(bases, askings, shares, fixings)
def test_a_fit_keeps_to_the_budget_the_effective_batch_the_rows_and_what_is_fixed(
    base: Architecture, asked: Setting, share: float, fixed: frozenset[str]
) -> None:
    budget = int(share * high(base, asked))
    try:
        found = fit(base, asked, budget, fixed=fixed)
    except TrainingError:
        return
    assert high(base, found.setting) <= budget
    assert found.plan == plan_memory(base, found.setting)
    if "micro_batch" not in fixed:
        assert asked.rows_per_step % found.setting.micro_batch == 0
    changed = {each.name for each in fields(Setting) if getattr(asked, each.name) != getattr(found.setting, each.name)}
    assert changed <= set(NAMES) - fixed
    assert changed == {each.field for each in found.decisions}
    assert found == fit(base, asked, budget, fixed=fixed)


@settings(max_examples=4, deadline=None)
@given(bases.filter(lambda base: base.layers <= 6), askings, shares)
def test_nothing_on_the_whole_grid_is_better(base: Architecture, asked: Setting, share: float) -> None:
    budget = int(share * high(base, asked))
    fitting = [setting for setting in grid(asked, base.layers) if high(base, setting) <= budget]
    try:
        found = fit(base, asked, budget, machine=CARD).setting
    except TrainingError:
        assert not fitting
        return
    best = min(order(base, asked, setting) for setting in fitting)
    assert order(base, asked, found) == best
    batches = [count for count in (1, 2, 4, 8, 16) if count <= asked.evaluation_batch]
    room = [count for count in batches if high(base, replace(found, evaluation_batch=count)) <= budget]
    assert found.evaluation_batch == max(room)


@settings(max_examples=12, deadline=None)
@given(bases, askings, shares, st.floats(1.0, 2.0))
def test_a_larger_budget_never_gives_more_up(base: Architecture, asked: Setting, share: float, more: float) -> None:
    budget = int(share * high(base, asked))
    try:
        tight = fit(base, asked, budget, machine=CARD).setting
    except TrainingError:
        return
    wide = fit(base, asked, int(budget * more), machine=CARD).setting
    assert order(base, asked, wide) <= order(base, asked, tight)


@settings(max_examples=6, deadline=None)
@given(bases, askings, shares)
def test_with_consent_rows_are_cut_no_more_than_needed(base: Architecture, asked: Setting, share: float) -> None:
    budget = int(share * high(base, asked))
    try:
        found = fit(base, asked, budget, consent=frozenset({"length"})).setting
    except TrainingError:
        return
    assert high(base, found) <= budget
    assert found.rows_per_step == asked.rows_per_step
    limit = max(found.longest, found.evaluation_longest)  # data.max_length holds for held-out rows too
    cut = {name: min(getattr(asked, name), limit) for name in ("longest", "evaluation_longest")}
    assert cut == {"longest": found.longest, "evaluation_longest": found.evaluation_longest}
    if limit < max(asked.longest, asked.evaluation_longest):
        names = ("longest", "labelled", "evaluation_longest")
        longer = replace(asked, **{name: min(getattr(asked, name), limit + 1) for name in names})
        with pytest.raises(TrainingError):
            fit(base, longer, budget)


def test_memory_that_is_free_is_used_unless_the_field_was_asked_for() -> None:
    asked = Setting(micro_batch=1, gradient_checkpointing=True, longest=128, labelled=128)
    free = fit(LLAMA_1B, asked, 80 * GB).setting
    assert (free.micro_batch, free.gradient_checkpointing) == (16, False)
    kept = fit(LLAMA_1B, asked, 80 * GB, fixed=frozenset({"micro_batch", "gradient_checkpointing"}))
    assert (kept.setting, kept.decisions) == (asked, ())


def test_no_more_blocks_are_checkpointed_than_needed() -> None:
    asked = Setting(micro_batch=4, rows_per_step=4, longest=2048, labelled=2048, evaluation_batch=1,
                    evaluation_longest=64, max_new_tokens=8)  # fmt: skip
    kept = frozenset({"micro_batch", "optim", "activation_offloading", "bits"})
    all_, none = (high(LLAMA_1B, replace(asked, gradient_checkpointing=on)) for on in (True, False))
    counts = []
    for share in range(10):
        budget = all_ + (none - 1 - all_) * share // 9
        found = fit(LLAMA_1B, asked, budget, machine=CARD, fixed=kept)
        counts.append(found.setting.checkpointed_blocks or LLAMA_1B.layers)
        fewer = replace(found.setting, checkpointed_blocks=counts[-1] - 1)
        if counts[-1] == 1:
            fewer = replace(asked, gradient_checkpointing=False)
        assert high(LLAMA_1B, fewer) > budget
    # The last block's activations are all there at the start of the backward pass, computed again or not.
    assert (counts[0], counts[-1]) == (15, 1)
    assert counts == sorted(counts, reverse=True)
    assert any("checkpointing of the lowest block alone: " in each.reason for each in found.decisions)
    whole = fit(LLAMA_1B, asked, none - 1, machine=CARD, fixed=kept | {"checkpointed_blocks"}).setting
    assert (whole.gradient_checkpointing, whole.checkpointed_blocks) == (True, None)


def test_an_8b_base_on_a_10_gb_card() -> None:
    asked = Setting(bits=16, micro_batch=8, rows_per_step=16, longest=512, labelled=128, evaluation_longest=512)
    found = fit(LLAMA_8B, asked, usable(find_device("RTX 3080 10GB").memory_bytes), machine=CARD)
    assert (found.setting.bits, found.setting.rows_per_step) == (4, 16)
    assert any("weights of 16 → 4 bits: " in each.reason for each in found.decisions)
    assert found.next is not None
    further = replace(found.setting, **{found.next.field: found.next.after})
    assert high(LLAMA_8B, further) < high(LLAMA_8B, found.setting)


def test_reasons_add_up() -> None:
    asked = Setting(micro_batch=8, rows_per_step=16, longest=2048, labelled=2048)
    found = fit(LLAMA_1B, asked, 6 * GB, machine=CARD)
    assert found.decisions
    setting = asked
    for each in found.decisions:
        after = replace(setting, **{each.field: each.after})
        stage = "evaluate" if each.field == "evaluation_batch" else "train"
        assert each.bytes_saved == stage_high(LLAMA_1B, setting, stage) - stage_high(LLAMA_1B, after, stage)
        if each.field == "micro_batch":
            assert each.reason.startswith(f"micro-batch 8 → {each.after}: ")
            assert each.reason.endswith("keeps the effective batch 16")
        setting = after
    assert setting == found.setting


def stage_high(base: Architecture, setting: Setting, name: str) -> int:
    return next(stage.bytes.high for stage in plan_memory(base, setting).stages if stage.name == name)


def refusal(base: Architecture, asked: Setting, budget: int, **more: Any) -> TrainingError:
    with pytest.raises(TrainingError) as error:
        fit(base, asked, budget, **more)
    return error.value


def test_what_does_not_fit_says_what_would() -> None:
    asked = Setting(longest=32768, labelled=32768, evaluation_batch=1, evaluation_longest=64, max_new_tokens=8)
    least = min(high(LLAMA_8B, setting) for setting in grid(asked, LLAMA_8B.layers))
    budget = int(least * 0.9)
    error = refusal(LLAMA_8B, asked, budget)
    assert "the smallest peak is" in error.fact
    assert fit(LLAMA_8B, asked, least).setting.longest == 32768
    refusal(LLAMA_8B, asked, least - 1)
    hint = error.hint or ""
    assert "cut rows at " in hint
    assert "smaller base" in hint
    longest = int(hint.split("cut rows at ")[1].split(" tokens")[0].replace(",", ""))
    assert fit(LLAMA_8B, replace(asked, longest=longest, labelled=longest), budget).setting.longest == longest
    refusal(LLAMA_8B, replace(asked, longest=longest + 1, labelled=longest + 1), budget)


def test_a_fixed_field_that_would_have_to_give_is_named() -> None:
    asked = Setting(bits=16, micro_batch=4, longest=512, labelled=512)
    error = refusal(LLAMA_8B, asked, 12 * GB, fixed=frozenset({"bits", "r"}))
    assert "bits=16" in str(error)
    assert "let bits 16 → " in str(error)


@pytest.mark.parametrize(
    ("asked", "name", "values"),
    [
        (Setting(rows_per_step=12), "micro_batch", (12, 6, 4, 3, 2, 1)),
        (Setting(optim="adamw_torch"), "optim", ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")),
        (Setting(optim="adamw_8bit"), "optim", ("adamw_8bit", "paged_adamw_8bit")),
        (Setting(optim="sgd"), "optim", ("sgd",)),
        (Setting(optim="adamw_torch", device="cpu"), "optim", ("adamw_torch",)),
        (Setting(device="cpu"), "activation_offloading", (False,)),
        (Setting(bits=32), "bits", (32, 8, 4)),
        (Setting(bits=8), "bits", (8, 4)),
        (Setting(bits=16, method="full", in_place=True), "bits", (16,)),
        (Setting(evaluation_batch=6), "evaluation_batch", (6, 3, 1)),
    ],
)
def test_what_each_field_may_become_the_most_welcome_first(asked: Setting, name: str, values: tuple[Any, ...]) -> None:
    assert choices(asked, name, frozenset()) == values
    assert choices(asked, name, frozenset({name})) == (getattr(asked, name),)


def test_packed_weights_are_no_way_out_for_full_fine_tuning() -> None:
    asked = Setting(bits=16, method="full", in_place=True, longest=256, labelled=256)
    found = fit(LLAMA_1B, asked, 24 * GB, machine=CARD).setting
    assert found.bits == 16
    refusal(LLAMA_8B, asked, 12 * GB)


def test_a_cpu_gets_no_optimizer_and_no_offloading_that_need_cuda() -> None:
    asked = Setting(bits=16, device="cpu", micro_batch=8, longest=512, labelled=512)
    try_budgets = [high(LLAMA_1B, asked) * share // 10 for share in range(1, 10)]
    answers: list[Fit] = []
    for budget in try_budgets:
        try:
            answers.append(fit(LLAMA_1B, asked, budget))
        except TrainingError:
            continue
    assert len(answers) >= 3
    assert {found.setting.optim for found in answers} == {"adamw_torch"}
    assert not any(found.setting.activation_offloading for found in answers)


def test_a_70b_base_takes_few_plans() -> None:
    counted: list[Setting] = []

    def counting(base: Architecture, setting: Setting) -> Any:
        counted.append(setting)
        return plan_memory(base, setting)

    asked = Setting(bits=16, micro_batch=8, longest=4096, labelled=4096)
    fit(LLAMA_70B, asked, 64 * GB, plan=counting)
    assert len(counted) == len(set(counted)) <= 60
