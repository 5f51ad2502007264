"""`quant.compute_dtype=measured`: who is asked, what is decided, and that the decision is what is computed in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbone.decide import place
from peftkit.backbone.load import load_backbone
from peftkit.backbone.measured import (
    FEWEST_ROUNDS,
    GAIN,
    LARGEST,
    SECONDS,
    TOKENS,
    TYPICAL,
    Block,
    Timing,
    block_of,
    measure,
    measured_dtype,
    passes,
    timed,
)
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, read_config
from peftkit.events import Decision, Event

DTYPES = (torch.float32, torch.bfloat16)


def took(float32: float, bfloat16: float, rounds: int = 9) -> Timing:
    return Timing(float32, bfloat16, TYPICAL, 512, rounds)


class Machine:
    """A clock, and work that moves it: seconds a token by dtype, and what a first call costs besides."""

    def __init__(self, float32: float, bfloat16: float, first: float = 0.0) -> None:
        self.now = 0.0
        self.first = first
        self.each = {torch.float32: float32, torch.bfloat16: bfloat16}
        self.done: list[tuple[torch.dtype, int]] = []

    def work(self, dtype: torch.dtype) -> Callable[[int], None]:
        def run(tokens: int) -> None:
            if not any(dtype == other for other, _ in self.done):
                self.now += self.first
            self.done.append((dtype, tokens))
            self.now += self.each[dtype] * tokens

        return run

    def timing(self) -> Timing:
        return timed(TYPICAL, {dtype: self.work(dtype) for dtype in DTYPES}, lambda: self.now)


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        (took(1.0, 0.4), "bfloat16"),
        (took(GAIN, 1.0), "bfloat16"),
        (took(GAIN * 0.999, 1.0), "float32"),
        (took(1.0, 30.0), "float32"),
        (took(1.0, 0.4, FEWEST_ROUNDS - 1), "float32"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster_by_the_margin(found: Timing, dtype: str) -> None:
    chosen = place(QuantSpec(device="cpu", compute_dtype="measured"), timing=lambda: found)
    assert chosen.compute_dtype == chosen.dtype == getattr(torch, dtype)
    reason = next(d.reason for d in chosen.decisions if d.what == "compute dtype")
    for figure in (found.float32, found.bfloat16):
        assert f"{figure * 1e3:.1f} ms" in reason


@pytest.mark.parametrize("quant", [{"bits": 32, "compute_dtype": "measured"}, {"compute_dtype": "auto"}, {}])
def test_nothing_is_timed_where_nothing_is_left_to_it(quant: dict[str, Any]) -> None:
    def never() -> Timing:
        raise AssertionError("timed")

    chosen = place(QuantSpec(device="cpu", **quant), timing=never)
    assert chosen.compute_dtype == torch.float32
    if quant.get("bits") == 32:
        assert any("32 bits" in d.reason and "nothing was measured" in d.reason for d in chosen.decisions)


def test_on_a_gpu_measured_means_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # stands for a card, as in test_decide
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
    for capability in ((7, 5), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        found, auto = (place(QuantSpec(compute_dtype=asked)) for asked in ("measured", "auto"))  # type: ignore[arg-type]
        assert found == auto


@pytest.mark.parametrize(("capability", "planned"), [(None, "float32"), ((7, 5), "float32"), ((8, 9), "bfloat16")])
def test_a_plan_counts_the_larger_dtype(capability: tuple[int, int] | None, planned: str) -> None:
    for asked in ("measured", "auto"):
        assert QuantSpec.model_validate({"compute_dtype": asked}).planned_compute_dtype(capability) == planned
    assert QuantSpec(compute_dtype="float16").planned_compute_dtype(capability) == "float16"


@pytest.mark.parametrize(
    ("machine", "tokens"),
    [
        (Machine(2e-5, 1e-5, first=0.3), TOKENS),
        (Machine(1e-3, 3e-4), 128),
        (Machine(1e-4, 2e-2), 16),  # bfloat16 piece by piece
        (Machine(0.2, 0.2), 16),
    ],
)
def test_the_figures_are_a_steady_passes_and_take_a_second(machine: Machine, tokens: int) -> None:
    found = machine.timing()
    assert found.float32 == pytest.approx(found.tokens * machine.each[torch.float32])
    assert found.bfloat16 == pytest.approx(found.tokens * machine.each[torch.bfloat16])
    assert found.tokens == tokens
    fewest = sum(machine.each.values()) * 2 * 16 + 2 * machine.first
    assert machine.now <= max(SECONDS, fewest)
    assert (found.rounds >= FEWEST_ROUNDS) == (fewest < SECONDS / 4 or machine.first > 0)


def test_dtypes_take_turns() -> None:
    """Another program that starts half way slows both alike."""
    machine = Machine(2e-5, 1e-5)
    assert machine.timing().rounds == 9, "the first round, which chooses kernels, is no figure"
    timed_ones = [dtype for dtype, tokens in machine.done if tokens == TOKENS]
    assert len(timed_ones) == 20
    assert all(a != b for a, b in itertools.pairwise(timed_ones))


def test_a_disturbance_of_some_rounds_changes_no_figure() -> None:
    machine = Machine(2e-5, 1e-5)
    quiet = machine.timing()
    disturbed = Machine(2e-5, 1e-5)
    true = disturbed.work(torch.bfloat16)

    def run(tokens: int) -> None:
        true(tokens)
        disturbed.now += 0.05 * (len(disturbed.done) in (10, 16, 20))

    found = timed(TYPICAL, {torch.float32: disturbed.work(torch.float32), torch.bfloat16: run}, lambda: disturbed.now)
    assert (found.float32, found.bfloat16) == pytest.approx((quiet.float32, quiet.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_computes_in_its_dtype_to_the_input(dtype: torch.dtype) -> None:
    """What is timed is really done: three products forward, three back, all in the dtype."""
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.__name__.startswith(("mm", "addmm")):
                seen.append((func.__name__, out.dtype))
            return out

    run = passes(Block(64, 128), dtype)
    with Watch(), torch.no_grad():
        run(4)
    assert [found for _, found in seen] == [dtype] * 6


def test_the_blocks_widths_are_the_bases(tiny_base: Path) -> None:
    assert block_of(read_config(tiny_base)) == Block(64, 128)
    assert block_of({"model_type": "unheard of"}) == TYPICAL
    for wide in (Block(8192, 28672), Block(4096, 14336)):
        cut = wide.cut()
        assert cut.hidden * cut.intermediate <= LARGEST
        assert cut.intermediate / cut.hidden == pytest.approx(wide.intermediate / wide.hidden, rel=0.05)
    assert Block(576, 1536).cut() == Block(576, 1536)


def test_several_processes_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.backbone import measured
    from peftkit.process_group import ProcessGroup

    monkeypatch.setattr(measured, "launched", lambda: ProcessGroup(1, 2, 1))
    assert measured_dtype(4, lambda: took(1.0, 0.1))[0] == "float32"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no gradients"])
def test_it_can_be_measured_in_the_middle_of_an_evaluation(mode: Any) -> None:
    block = Block(64, 64) if mode is torch.no_grad else Block(64, 128)  # each is measured once
    with mode():
        assert measure(block).rounds > 0


def test_a_real_measurement_is_made_once_and_recorded(tiny_base: Path, tmp_path: Path) -> None:
    """Whatever it finds, what is said, held, computed in and recorded agree, and a second load does not differ."""
    events: list[Event] = []
    spec = QuantSpec(device="cpu", bits=16, compute_dtype="measured")
    first = load_backbone(BaseSpec(source=str(tiny_base)), spec, tmp_path / "cache", report=events.append)
    started = time.perf_counter()
    again = measure(block_of(read_config(tiny_base)))
    assert time.perf_counter() - started < 60  # it returns
    assert again is measure(block_of(read_config(tiny_base)))
    said = next(e for e in events if isinstance(e, Decision) and e.what == "compute dtype")
    assert said.choice == ("bfloat16" if again.faster else "float32")
    assert again.text in said.reason
    assert first.quantization_record()["compute_dtype"] == first.quant.compute_dtype == said.choice
    assert {p.dtype for p in first.model.parameters()} == {getattr(torch, said.choice)}
