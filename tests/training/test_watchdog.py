"""Each rule fires on its planted trace, and none on clean noisy ones."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.training.watchdog import RULES, Alarm, Watchdog

Trace = list[tuple[int, dict[str, float]]]
WARMUP = 12


def clean(seed: int, steps: int = 300) -> Trace:
    """A run as they are: losses scattered by 30 %, hard batches, heavy-tailed norms, a peak that settles."""
    draw, peak, trace = random.Random(seed), 1.7, []
    for step in range(1, steps + 1):
        warm = min(1.0, (step - 1) / WARMUP)
        hard = 2.5 if draw.random() < 0.02 else 1.0
        peak = max(peak, 1.7 + draw.expovariate(1) * 0.08)
        trace.append((step, {
            "loss": (0.6 + 2.2 * math.exp(-step / 60)) * math.exp(draw.gauss(0, 0.3)) * hard,
            "grad_norm": math.exp(draw.gauss(0, 0.5)) * (3 if draw.random() < 0.02 else 1),
            "learning_rate": 1e-4 * warm * (1 + math.cos(math.pi * step / steps)),
            "tokens_per_s": 1000 * math.exp(draw.gauss(0, 0.2)),
            "peak_gb": peak,
        }))  # fmt: skip
    return trace


def dog(learning_rate: float = 2e-4) -> Watchdog:
    return Watchdog(300, learning_rate=learning_rate, warmup_steps=WARMUP)


def watch(
    trace: Iterable[tuple[int, dict[str, float]]], learning_rate: float = 2e-4, thaws: Container[int] = ()
) -> list[Alarm]:
    watching, alarms = dog(learning_rate), []
    for step, figures in trace:
        if step in thaws:
            watching.begin_anew()
        alarms += watching.observe(step, figures)
    return alarms


def change(change: Callable[[int, dict[str, float]], dict[str, float]]) -> Trace:
    return [(step, {**figures, **change(step, figures)}) for step, figures in clean(3)]


def measured(nlls: list[float]) -> Trace:
    return [(10 * (index + 1), {"held_out_nll": nll}) for index, nll in enumerate(nlls)]


PLANTED = {
    "loss-not-finite": change(lambda s, f: {"loss": math.nan} if s == 50 else {}),
    "gradient-not-finite": change(lambda s, f: {"grad_norm": math.inf} if s == 50 else {}),
    "zero-gradient": change(lambda s, f: {"grad_norm": 0.0} if s >= 50 else {}),
    "divergence": change(lambda s, f: {"loss": f["loss"] + 0.15 * max(0, s - 100)}),
    "loss-spike": change(lambda s, f: {"loss": 9.0} if 100 <= s <= 104 else {}),
    "gradient-explosion": change(lambda s, f: {"grad_norm": 400.0} if s in (100, 105, 110) else {}),
    "rate-too-high": change(lambda s, f: {"loss": 2.8 + 0.2 * s}),
    "rate-too-low": change(lambda s, f: {"loss": 2.5 + 0.1 * math.sin(s), "learning_rate": 1e-7}),
    "evaluation-worse": measured([2.0, 1.0, 1.1, 1.2, 1.3]),
    "memory-creep": change(lambda s, f: {"peak_gb": 2.0 + 0.002 * s}),
    "throughput-collapse": change(lambda s, f: {"tokens_per_s": 100.0} if s >= 150 else {}),
}


def test_every_rule_has_a_planted_trace() -> None:
    assert {rule.id for rule in RULES} == set(PLANTED)
    assert len(RULES) == len({rule.id for rule in RULES})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_planted_fault_is_found(rule) -> None:
    alarms = watch(PLANTED[rule.id])
    mine = [alarm for alarm in alarms if alarm.rule == rule.id]
    assert mine, alarms
    assert {alarm.action for alarm in mine} == {rule.action}
    assert all(alarm.fact and alarm.expected and alarm.hint for alarm in mine)
    assert f"step {mine[0].step}: " in mine[0].text


# What else a fault sets off, because it is the same fault seen from another side.
ALSO = {"divergence": {"loss-spike"}, "rate-too-high": {"divergence", "loss-spike"}}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_sets_off_no_unrelated_rule(name: str) -> None:
    assert {alarm.rule for alarm in watch(PLANTED[name])} <= {name} | ALSO.get(name, set())


def test_false_alarms_on_clean_noisy_traces() -> None:
    """None in 60 runs of 300 steps, 18,000 steps: at 95 % fewer than 1 in 20 runs (rule of three)."""
    counts = Counter(alarm.rule for seed in range(60) for alarm in watch(clean(seed)))
    assert counts == {}


def test_a_single_hard_batch_or_a_converged_loss_is_no_spike() -> None:
    assert watch(change(lambda s, f: {"loss": 12.0} if s in (100, 101, 160) else {})) == []
    # 100 times the median, but nothing to a model at a perplexity of 1.004
    assert watch(change(lambda s, f: {"loss": 0.4 if 250 < s < 256 else 0.004} if s > 150 else {})) == []


def test_a_warning_is_not_said_at_every_step() -> None:
    alarms = watch(PLANTED["throughput-collapse"])
    assert 1 <= len(alarms) <= 3


def test_a_lower_rate_is_named() -> None:
    (alarm, *_) = watch(PLANTED["rate-too-high"])
    assert alarm.rule == "rate-too-high"
    assert alarm.hint == "train.learning_rate=4e-05"  # a fifth of 2e-4


@pytest.mark.parametrize("rule", [rule.id for rule in RULES if rule.id.startswith(("rate", "loss", "grad", "diver"))])
def test_what_is_advised_is_relative_to_the_runs_own_setting(rule: str) -> None:
    """LoRA+ with a ratio of 16: the highest group trains at 16 times train.learning_rate, and shows it."""
    times = 10 if rule == "rate-too-low" else 1 / 5
    for rate in (1e-4, 1e-6):
        (alarm, *_) = [alarm for alarm in watch(PLANTED[rule], learning_rate=rate) if alarm.rule == rule]
        assert alarm.hint.startswith(f"train.learning_rate={times * rate:.1g}")


def thawed(step: int, figures: dict[str, float]) -> dict[str, float]:
    """More depths join at steps 100 and 200: a third of the speed, ten times the norm, and more memory, each time."""
    times = (step >= 100) + (step >= 200)
    return {
        "tokens_per_s": figures["tokens_per_s"] / 4**times,
        "grad_norm": figures["grad_norm"] * 12**times,
        "peak_gb": figures["peak_gb"] + times,
    }


def test_a_thaw_is_no_fault() -> None:
    assert {alarm.rule for alarm in watch(change(thawed))} == {"throughput-collapse", "gradient-explosion"}
    assert watch(change(thawed), thaws=(100, 200)) == []
    every_block = change(lambda s, f: {"peak_gb": 2.0 + s // 50})
    assert {alarm.rule for alarm in watch(every_block)} == {"memory-creep"}
    assert watch(every_block, thaws=range(0, 300, 50)) == []


def test_what_comes_after_a_thaw_is_still_found() -> None:
    for rule, fault in (("gradient-explosion", {"grad_norm": 12e3}), ("throughput-collapse", {"tokens_per_s": 1.0})):
        trace = change(lambda s, f, fault=fault: {**thawed(s, f), **(fault if s >= 240 else {})})
        assert {alarm.rule for alarm in watch(trace, thaws=(100, 200))} == {rule}


def test_a_figure_that_is_not_there_is_no_alarm() -> None:
    assert watch([(step, {}) for step in range(1, 200)]) == []
    assert watch([(step, {"loss": 1.0}) for step in range(1, 200)]) == []


@given(seed=st.integers(0, 50), fault=st.sampled_from(sorted(PLANTED)), cut=st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_a_restored_watchdog_says_the_same(seed: int, fault: str, cut: int) -> None:
    trace = PLANTED[fault] if seed % 2 else clean(seed)
    one = dog()
    whole = [one.observe(step, figures) for step, figures in trace]
    first = dog()
    before = [first.observe(step, figures) for step, figures in trace[:cut]]
    kept = json.loads(json.dumps(first.state(), allow_nan=False))
    again = dog().restore(kept)
    assert before + [again.observe(step, figures) for step, figures in trace[cut:]] == whole
    assert again.state() == one.state()


def test_a_new_watchdog_restores_nothing() -> None:
    assert dog().restore({}).state() == dog().state()


@given(st.lists(st.dictionaries(st.sampled_from(["loss", "grad_norm", "learning_rate", "peak_gb", "tokens_per_s",
                                                 "held_out_nll"]), st.floats(allow_nan=True), max_size=5),
                max_size=80))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_figures_break_it(figures: list[dict[str, float]]) -> None:
    assert {alarm.rule for alarm in watch(list(enumerate(figures, 1)))} <= {rule.id for rule in RULES}
