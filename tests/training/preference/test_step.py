"""A step on preferences is the same however it is split and laid out, and begins at what is known by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from peftkit.data.preference.example import PreferenceExample
from peftkit.errors import TrainingError
from peftkit.generation.forward import row_nll
from peftkit.training.objective import objective
from peftkit.training.preference.paths import PreferencePaths, preference_paths
from peftkit.training.preference.reference import reference_scored
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.step import Step

Make = Callable[..., Any]
Rows = Callable[..., list[PreferenceExample]]
SHAPES = ((5, 7, 3), (9, 2, 12), (4, 16, 16), (11, 6, 9), (7, 3, 4), (3, 20, 2), (6, 6, 5), (14, 1, 8))
OPTIONS: dict[str, Any] = {"pad_id": 2, "device": torch.device("cpu")}
SPECS = [
    PreferenceTrainSpec(sft_weight=0.5),
    PreferenceTrainSpec(loss="orpo", beta=0.3),
    PreferenceTrainSpec(loss="kto", beta=0.2),
]


def scored(tuned: Any, rows: list[PreferenceExample], paths: PreferencePaths) -> list[PreferenceExample]:
    """Rows as a step's micro-batches get them."""
    known = reference_scored(tuned, rows, paths)
    return paths.prepared(tuned.model, known, 10_000, **OPTIONS)


def step_of(tuned: Any, rows: list[PreferenceExample], paths: PreferencePaths) -> Step:
    tuned.model.train()
    return Step(tuned.model, rows, paths=paths, objective=objective(tuned, paths.spec.regularize, paths), **OPTIONS)


def gradients(tuned: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in tuned.trainable.values() if p.grad is not None])
    for parameter in tuned.trainable.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.loss))
def test_one_batch_of_eight_is_eight_of_one(adapted: Make, preferences: Rows, spec: PreferenceTrainSpec) -> None:
    tuned = adapted(bits=4)
    found = preference_paths(tuned, spec)
    assert found.flat
    assert found.head is not None
    plain = replace(found, flat=False, head=None, fused=False)
    chunked = replace(found, head=replace(found.head, vocabulary=1 << 22))  # 4 rows of logits at once
    rows = scored(tuned, preferences(SHAPES, labelled=spec.loss == "kto"), found)
    expected, loss = None, 0.0
    for paths, tokens, batches in (
        (found, 10_000, 1), (found, 1, 8), (found, 40, None), (plain, 10_000, 1), (plain, 1, 8), (plain, 60, None),
        (chunked, 40, None),
    ):  # fmt: skip
        result = step_of(tuned, rows, paths).run(tokens)
        assert batches in (None, result.micro_batches)
        got = gradients(tuned)
        if expected is None:
            expected, loss = got, result.loss
            assert result.answer_tokens == len(SHAPES)  # a step's loss is a mean over rows
            assert expected.norm() > 0
        assert result.loss == pytest.approx(loss, rel=2e-6)
        assert float((got - expected).norm() / expected.norm()) <= 2e-6


def test_a_fresh_adapter_is_the_base(tuned: Make, preferences: Rows) -> None:
    """B is zero: every margin is 0, so DPO's loss is log 2, IPO's (1 / 2τ)², hinge's 1, and KTO's 1/2."""
    made = tuned(bits=4)
    for settings, expected in (
        ({}, math.log(2)),
        ({"loss_type": "ipo", "beta": 0.25}, 4.0),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss": "kto"}, 0.5),
    ):
        paths = preference_paths(made, PreferenceTrainSpec(**settings))
        rows = scored(made, preferences(SHAPES, labelled=paths.spec.loss == "kto"), paths)
        assert step_of(made, rows, paths).run(50).loss == pytest.approx(expected, abs=1e-5)
        gradients(made)


def test_the_reference_is_the_base_whatever_the_adapter_is(adapted: Make, tuned: Make, preferences: Rows) -> None:
    rows = preferences(SHAPES)
    made = adapted(bits=4)
    paths = preference_paths(made, PreferenceTrainSpec())
    made.model.train()
    known = reference_scored(made, rows, paths)
    assert made.model.training  # as it was
    fresh = tuned(bits=4).model.eval()
    for side, sequences in enumerate(([row.chosen for row in rows], [row.rejected for row in rows])):
        expected = row_nll(fresh, sequences, **OPTIONS)
        assert [-row.reference[side] for row in known] == pytest.approx(expected, rel=1e-5)
    # And it is not what the adapter gives: the test above would not see the adapter left on.
    assert row_nll(made.model.eval(), [row.chosen for row in rows], **OPTIONS) != pytest.approx(
        [-row.reference[0] for row in known], rel=1e-3
    )


def test_orpo_asks_for_no_reference(adapted: Make, preferences: Rows) -> None:
    tuned = adapted(bits=4)
    paths = preference_paths(tuned, PreferenceTrainSpec(loss="orpo"))
    assert all(not row.reference for row in reference_scored(tuned, preferences(SHAPES), paths))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.loss))
def test_what_is_measured_is_what_is_trained(adapted: Make, preferences: Rows, spec: PreferenceTrainSpec) -> None:
    tuned = adapted(bits=4)
    paths = preference_paths(tuned, spec)
    rows = scored(tuned, preferences(SHAPES, labelled=spec.loss == "kto"), paths)
    tuned.model.eval()
    losses = paths.measure(tuned.model, rows, batch_size=3, **OPTIONS)
    assert paths.counted(rows) == len(losses) == len(SHAPES)
    assert sum(losses) / len(losses) == pytest.approx(step_of(tuned, rows, paths).run(10_000).loss, rel=1e-5)
    assert losses[::-1] == pytest.approx(paths.measure(tuned.model, rows[::-1], batch_size=8, **OPTIONS), rel=1e-5)


def test_the_divergence_of_a_step_is_no_micro_batchs(adapted: Make, preferences: Rows) -> None:
    """The mean over all rows of the step, by the plain likelihoods; none of it reaches the gradients."""
    tuned = adapted(bits=4)
    paths = preference_paths(tuned, PreferenceTrainSpec(loss="kto"))
    rows = reference_scored(tuned, preferences(SHAPES, labelled=True), paths)
    policy = row_nll(tuned.model.eval(), [row.mismatched for row in rows], **OPTIONS)
    expected = sum(-nll - row.reference[1] for nll, row in zip(policy, rows, strict=True)) / len(rows)
    for tokens in (1, 50, 10_000):
        ready = paths.prepared(tuned.model, rows, tokens, **OPTIONS)
        (divergence,) = {row.divergence for row in ready}
        assert divergence == pytest.approx(max(0.0, expected), rel=1e-4, abs=1e-4)
    assert all(parameter.grad is None for parameter in tuned.trainable.values())


@pytest.mark.parametrize(("loss", "labelled"), [("dpo", False), ("kto", True), ("orpo", True)])
def test_rows_that_were_not_scored_are_refused(adapted: Make, preferences: Rows, loss: str, labelled: bool) -> None:
    tuned = adapted(bits=4)
    paths = preference_paths(tuned, PreferenceTrainSpec.model_validate({"loss": loss}))
    with pytest.raises(TrainingError, match=r"made\.jsonl:\d and its neighbours: no "):
        step_of(tuned, preferences(SHAPES, labelled=labelled), paths).run(10_000)
