"""Twenty optimizer steps by every quick way: losses and gradients are those of the plain way, to 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.passes.lab import Trace, adapted, apart, moved, tiny, trace, turns

from peftkit.events import Decision
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.memory import checkpoint_activations
from peftkit.training.objective import Objective
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.trying import find_paths
from peftkit.training.regularize.losses import TokenLoss
from peftkit.training.schedule import schedule
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned

STEPS = [turns((3, 17, 9, 26, 5, 12)[: 4 + at % 3], seed=at) for at in range(20)]
TOKENS = 40
FAMILIES = {
    "LlamaForCausalLM": None,
    "GPT2LMHeadModel": None,
    "Gemma2ForCausalLM": 8,
    "Gemma3ForCausalLM": 16,
    "Qwen2ForCausalLM": None,
    "Qwen3ForCausalLM": None,
}
"""Class → the longest row that its windows let lie flat."""
FIRST = [name if at < 3 else pytest.param(name, marks=pytest.mark.full) for at, name in enumerate(FAMILIES)]
WAYS: dict[str, Callable[[Paths], Paths]] = {
    "flat": lambda paths: paths,
    "padded": lambda paths: replace(paths, flat=False),
    "head alone": lambda paths: replace(paths, flat=False, fused=False, keeps_some=False),
    "flat, LoRA as PEFT has it": lambda paths: replace(paths, fused=False),
    "LoRA alone": lambda paths: Paths(fused=True),
}


@pytest.fixture(scope="module")
def lively_base(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose attention is not nearly even: gradients of queries and keys are no rounding noise there."""
    return make_base(tmp_path_factory.mktemp("lively"), initializer_range=0.2)


def assert_same(found: Trace, wanted: Trace, within: float = 1e-5) -> None:
    assert len(found) == len(wanted) == 20
    for (loss, trained), (right, expected) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(right, rel=within)
        assert apart(trained, expected) <= within
    losses = [loss for loss, _ in wanted]
    assert max(losses) - min(losses) > 0.01, "the steps differ, so a wrong row would show"


def of(tuned: Tuned, paths: Paths) -> Paths:
    """The same ways through a model of the same kind."""
    return paths if paths.head is None else replace(paths, head=replace(paths.head, module=head_of(tuned)))


def head_of(tuned: Tuned) -> Any:
    return tuned.inner.get_output_embeddings()


@pytest.mark.parametrize("name", FIRST)
def test_every_family(name: str) -> None:
    """Odd steps lie flat, even ones are padded: each way meets weights that the other one changed."""
    first, second = adapted(tiny(name)), adapted(tiny(name))
    paths = find_paths(second)
    eager = paths.reasons != ()
    assert (paths.flat, paths.fused) == (not eager, True)
    assert eager is (name == "Gemma2ForCausalLM"), "its scores are capped, which no fused kernel does"
    assert eager or paths.longest == FAMILIES[name]
    flat = {laid for rows in STEPS for _, laid in paths.micro_batches([len(row.input_ids) for row in rows], TOKENS)}
    assert flat == ({False} if eager else {True} if FAMILIES[name] is None else {True, False})
    wanted = trace(first, STEPS, [Paths()], 1000)
    assert_same(trace(second, STEPS, [paths, replace(paths, flat=False)], TOKENS), wanted)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_and_way(name: str, way: str) -> None:
    paths = WAYS[way](find_paths(adapted(tiny(name))))
    again = adapted(tiny(name))
    wanted = trace(adapted(tiny(name)), STEPS, [Paths()], 1000)
    assert_same(trace(again, STEPS, [of(again, paths)], TOKENS), wanted)


@pytest.mark.parametrize("name", [FIRST[0], *(pytest.param(name, marks=pytest.mark.full) for name in [*FAMILIES][1:])])
def test_with_checkpointing_of_some_blocks(name: str) -> None:
    first, second = adapted(tiny(name)), adapted(tiny(name))
    paths = find_paths(second)
    checkpoint_activations(second, 1)
    ran = times_run(second)
    wanted = trace(first, STEPS, [Paths()], 1000)
    assert_same(trace(second, STEPS, [paths], TOKENS), wanted)
    assert ran["first"] == 2 * ran["last"] > 40, "the first block ran again in every backward pass, the last did not"


def times_run(tuned: Tuned) -> dict[str, int]:
    """How often the first and the last layer with LoRA run from here on."""
    ran = {"first": 0, "last": 0}
    layers = [module for module in tuned.model.modules() if hasattr(module, "lora_A")]
    for which, layer in (("first", layers[0]), ("last", layers[-1])):

        def count(module: Any, args: Any, which: str = which) -> None:
            ran[which] += 1

        layer.register_forward_pre_hook(count)
    return ran


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.full)])
def test_over_quantized_weights_with_checkpointing(tuned: Callable[..., Any], lively_base: Path, bits: int) -> None:
    first, second = moved(tuned(lively_base, bits=bits)), moved(tuned(lively_base, bits=bits))
    paths = find_paths(second)
    assert (paths.flat, paths.fused) == (True, True)
    checkpoint_activations(second)
    wanted = trace(first, STEPS, [Paths()], 1000)
    assert_same(trace(second, STEPS, [paths], TOKENS), wanted)


@pytest.mark.full
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_with_label_smoothing(name: str) -> None:
    first, second = adapted(tiny(name)), adapted(tiny(name))
    loss = Objective(TokenLoss(label_smoothing=0.2))
    wanted = trace(first, STEPS, [Paths()], 1000, loss)
    assert_same(trace(second, STEPS, [find_paths(second)], TOKENS, loss), wanted)
    plain = trace(adapted(tiny(name)), STEPS[:1], [Paths()], 1000)
    assert apart(wanted[0][1], plain[0][1]) > 0.01, "smoothing changes gradients"


def test_a_leak_between_rows_would_show() -> None:
    """The comparison sees one row that attends to the one before it: two rows of STEPS[0] joined into one."""
    tuned = adapted(tiny("LlamaForCausalLM"))
    wanted = trace(tuned, STEPS[:1], [Paths()], 1000)
    short, long = STEPS[0][0], STEPS[0][1]
    joined = replace(long, input_ids=short.input_ids + long.input_ids, labels=[*short.labels, -100, *long.labels[1:]])
    found = trace(adapted(tiny("LlamaForCausalLM")), [[joined, *STEPS[0][2:]]], [Paths()], 1000)
    assert abs(found[0][0] - wanted[0][0]) > 1e-3
    assert apart(found[0][1], wanted[0][1]) > 0.01


def test_training_takes_the_quick_ways_and_keeps_the_loss(
    tuned: Callable[..., Any], lively_base: Path, tmp_path: Path
) -> None:
    """`train` as a whole: its log is the plain trace of the same steps, and its report says what it took."""
    rows = [row for step in STEPS for row in step[:4]]
    spec = TrainSpec(
        max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0.0
    )
    losses: list[float] = []
    said: list[Any] = []

    def log(step: int, figures: dict[str, float]) -> None:
        losses.append(figures["loss"])

    train(moved(tuned(lively_base, bits=32)), rows, spec, tmp_path / "run", report=said.append, log=log)
    told = next(event for event in said if isinstance(event, Decision) and event.what == "passes")
    assert told.choice.startswith("rows without padding, head at labels, ")
    assert told.choice.endswith("LoRA fused")
    assert losses == pytest.approx(plain_losses(moved(tuned(lively_base, bits=32)), rows, spec), rel=1e-5)


def test_a_resumed_run_by_the_quick_ways_is_the_uninterrupted_one(
    tuned: Callable[..., Any], lively_base: Path, tmp_path: Path
) -> None:
    """Bit by bit, with rows laid flat and LoRA fused: test_resume.py has dropout, which LoRA is not fused with."""
    rows = [row for step in STEPS[:6] for row in step[:4]]
    spec = TrainSpec(max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=1)

    def run(folder: Path, stop_at: int | None = None, **options: Any) -> tuple[dict[int, float], dict[str, Any]]:
        one, losses = moved(tuned(lively_base, bits=4)), {}

        def log(step: int, figures: dict[str, float]) -> None:
            if step == stop_at:
                raise KeyboardInterrupt
            losses[step] = figures["loss"]

        with pytest.raises(KeyboardInterrupt) if stop_at else nullcontext():
            train(one, rows, spec, folder / "run", checkpoints=Checkpoints(folder), log=log, **options)
        return losses, {name: value.detach().clone() for name, value in one.trainable.items()}

    said: list[Any] = []
    losses, trained = run(tmp_path / "whole")
    first, _ = run(tmp_path / "cut", stop_at=4)
    start = Checkpoints(tmp_path / "cut").newest()
    rest, resumed = run(tmp_path / "cut", start=start, report=said.append)
    assert (sorted(first), sorted(rest)) == ([1, 2, 3], [4, 5, 6])
    assert first | rest == losses
    assert [name for name, value in trained.items() if not torch.equal(value, resumed[name])] == []
    told = next(event.choice for event in said if isinstance(event, Decision) and event.what == "passes")
    assert "rows without padding" in told
    assert "LoRA fused" in told


def plain_losses(tuned: Tuned, rows: Sequence[Any], spec: TrainSpec) -> list[float]:
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=spec.learning_rate or 0.0, weight_decay=0.0)
    tuned.model.train()
    losses = []
    for chosen in schedule(rows, spec).steps:
        optimizer.zero_grad()
        step = Step(tuned.model, [rows[at] for at in chosen], pad_id=2, device=tuned.backbone.device)
        losses.append(step.run(1000).loss)
        torch.nn.utils.clip_grad_norm_(list(tuned.trainable.values()), spec.max_grad_norm)
        optimizer.step()
    return losses
