"""AdaLoRA in a run: the budget's formula, PEFT's penalty, what a checkpoint holds, and ranks that survive the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tuning.test_trained_methods import IDS, disturbed, examples, logits, merged_logits, spec_of

from peftkit.errors import TrainingError, TuningError
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.allocator import Allocator
from peftkit.tuning.attach import attach, resume_adapter
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

STEPS = 20
SPEC = TrainSpec(
    max_steps=STEPS,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    num_train_epochs=50,
    save_steps=8,
    save_total_limit=3,
)


def left(tuned: Tuned) -> list[int]:
    """Ranks of every module that still have a value."""
    return [int((p != 0).sum()) for name, p in tuned.model.named_parameters() if ".lora_E." in name]


def budget(step: int) -> int:
    """Of 14 modules from 6 to 4, from step 2 to step 14 of 20 (arXiv 2303.10512, equation 12)."""
    start, target = 14 * 6, 14 * 4
    if step <= 2:
        return start
    if step >= 14:
        return target
    return int(target + (start - target) * (1 - (step - 2) / 12) ** 3)


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, list[int], Checkpoints, Any]:
    """One whole run: the adapter, the ranks left before every step, its checkpoints, and how to load the base."""
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec

    top = tmp_path_factory.mktemp("adalora")

    def load(folder: Path = tiny_base) -> Any:
        return load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=32), top / "cache")

    tuned, seen = inject(load(), spec_of("adalora")), []
    kept = Checkpoints(top / "checkpoints")
    train(
        tuned,
        examples(),
        SPEC,
        top / "trainer",
        checkpoints=kept,
        log=lambda step, figures: seen.append(sum(left(tuned))),
    )
    return tuned, [*seen, sum(left(tuned))], kept, load


def test_the_ranks_follow_the_cubic_budget(run: Any) -> None:
    tuned, seen, _, _ = run
    assert len(seen) == STEPS + 1
    assert seen[0] == 0, "E begins at 0"
    assert seen[1:] == [budget(step) for step in range(1, STEPS + 1)]
    assert seen[-1] == 4 * 14, "r on the average"
    assert len(set(left(tuned))) > 1, "and not the same everywhere"


def test_the_file_holds_the_ranks_that_are_left(run: Any, registry: Any, tmp_path: Path) -> None:
    tuned, _, _, load = run
    folder = save_adapter(tuned, tmp_path / "adapter")
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(sum(kept) for kept in pattern.values()) == sorted(left(tuned))
    fields = {"kind": "peft", "base": base_fields(tuned.backbone), "adapter": tuned.spec.record()}
    version = registry.publish("x", folder, Draft.model_validate(fields), base=tuned.backbone.identity.record)
    torch.testing.assert_close(logits(attach(load(), version).model), logits(tuned.model), rtol=1e-5, atol=1e-6)

    continued = resume_adapter(load(), version, AdapterSpec(method="adalora"))
    torch.testing.assert_close(logits(continued.model), logits(tuned.model), rtol=1e-5, atol=1e-6)
    ranks = left(continued)
    train(continued, examples(), SPEC.model_copy(update={"max_steps": 3}), tmp_path / "trainer")
    assert left(continued) == ranks == left(tuned), "an adapter that was pruned keeps its ranks"
    again = registry.publish("x", save_adapter(continued, tmp_path / "again"), Draft.model_validate(fields))
    torch.testing.assert_close(logits(attach(load(), again).model), logits(continued.model), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_before_the_last_masking_is_saved_as_it_computes(
    run: Any, registry: Any, tiny_base: Path, tmp_path: Path
) -> None:
    """What early stopping goes back to: it has values where the last masking has none, and a module without any."""
    _, _, kept, load = run
    tuned = inject(load(), spec_of("adalora"))
    state = kept.load(16).state
    with torch.no_grad():
        for name, parameter in tuned.trainable.items():
            parameter.copy_(state["adapter"][name])
        first, second = (p for name, p in tuned.trainable.items() if "q_proj.lora_E" in name)
        first.zero_()
        second.fill_(0.1)
    tuned.model.peft_config["default"].rank_pattern = state["allocator"]["rank_pattern"]
    folder = save_adapter(tuned, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load().model, str(folder))
    torch.testing.assert_close(logits(loaded), logits(tuned.model), rtol=1e-5, atol=1e-6)
    fields = {"kind": "peft", "base": base_fields(tuned.backbone), "adapter": tuned.spec.record()}
    version = registry.publish("x", folder, Draft.model_validate(fields), base=tuned.backbone.identity.record)
    torch.testing.assert_close(logits(attach(load(), version).model), logits(tuned.model), rtol=1e-5, atol=1e-6)
    merged = merged_logits(lambda *given, **quant: load(*given), registry, tmp_path, tiny_base)
    torch.testing.assert_close(merged, logits(tuned.model), rtol=1e-4, atol=1e-4)
    assert tuned.model.peft_config["default"].rank_pattern == state["allocator"]["rank_pattern"]


def test_a_resumed_run_ends_bit_for_bit_where_the_other_did(run: Any, tmp_path: Path) -> None:
    tuned, _, kept, load = run
    state = kept.load(8)
    assert state.state["allocator"]["rank_pattern"] is not None
    other = inject(load(), spec_of("adalora"))
    train(other, examples(), SPEC, tmp_path / "trainer", start=state)
    assert all(torch.equal(parameter, other.trainable[name]) for name, parameter in tuned.trainable.items())
    assert other.model.peft_config["default"].rank_pattern == tuned.model.peft_config["default"].rank_pattern


def test_a_pruned_adapter_that_is_trained_again_keeps_its_ranks(run: Any, tmp_path: Path) -> None:
    """In the same process the ranks that were taken are rows of zeros still, with gradients that are not."""
    _, seen, kept, load = run
    tuned = inject(load(), spec_of("adalora"))
    train(tuned, examples(), SPEC, tmp_path, start=kept.load(16))
    ranks = left(tuned)
    assert sum(ranks) == seen[-1] == 4 * 14
    steps = []
    again = SPEC.model_copy(update={"max_steps": 3})
    train(tuned, examples(), again, tmp_path, log=lambda step, figures: steps.append(left(tuned)))
    assert [*steps, left(tuned)] == [ranks] * 4


def test_the_penalty_is_that_of_peft(load: Callable[..., Any]) -> None:
    """PEFT adds it to a loss that it computes itself, which `generation.forward` never asks for."""
    tuned = disturbed(inject(load(bits=32), spec_of("adalora")))
    tuned.model.zero_grad()
    Allocator(tuned, STEPS).penalize()
    ours = {name: p.grad for name, p in tuned.trainable.items() if ".lora_E." not in name}
    tuned.model.zero_grad()
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    both = {name: p.grad.clone() for name, p in tuned.trainable.items()}
    tuned.model.peft_config["default"].orth_reg_weight = 0.0
    tuned.model.zero_grad()
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(ours) == 28
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, both[name] - tuned.trainable[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_the_penalty_is_least_where_factors_are_orthogonal(load: Callable[..., Any], scale: float) -> None:
    """With QQᵀ = I, the gradient of ‖s²QQᵀ − I‖ by sQ is ±2 s²Q / (s √r), outside and inside: it leads back to Q."""
    tuned = inject(load(bits=32), spec_of("adalora"))
    factors = {name: p for name, p in tuned.trainable.items() if ".lora_E." not in name}
    with torch.no_grad():
        for parameter in factors.values():
            torch.nn.init.orthogonal_(parameter).mul_(scale)
    Allocator(tuned, STEPS).penalize()
    weight, r = tuned.model.peft_config["default"].orth_reg_weight, tuned.spec.init_r
    assert (weight, r) == (0.5, 6)
    for parameter in factors.values():
        expected = (1 if scale > 1 else -1) * weight / len(factors) * 2 * parameter.detach() / r**0.5
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_runs_that_cannot_lower_ranks_are_refused(load: Callable[..., Any], tmp_path: Path) -> None:
    tuned = inject(load(bits=32), spec_of("adalora"))
    with pytest.raises(TuningError, match="at least 2 steps"):
        train(tuned, examples(), SPEC.model_copy(update={"max_steps": 1}), tmp_path)
    frozen = TrainSpec.model_validate({"max_steps": 4, "unfreeze": {"direction": "deep_first", "every_steps": 2}})
    with pytest.raises(TrainingError, match="frozen layers have none"):
        train(tuned, examples(), frozen, tmp_path)
