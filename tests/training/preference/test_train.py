"""A whole run on preferences: it learns them, a resumed run is the uninterrupted one bit by bit, the base stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.data.preference.example import PreferenceExample
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.preference.paths import preference_paths
from peftkit.training.preference.reference import reference_scored
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.sft import Trained, train
from peftkit.tuning.tuned import Tuned

Make = Callable[..., Tuned]
Rows = Callable[..., list[PreferenceExample]]
Trace = dict[int, dict[str, float]]

SHAPES = ((5, 7, 3), (9, 2, 12), (4, 8, 8), (7, 3, 4), (3, 10, 2))
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_steps": 3,
    "learning_rate": 1e-2, "save_steps": 1, "save_total_limit": 100, "warmup_ratio": 0.3,
}  # fmt: skip
STEPS = 4


class Killed(BaseException):
    """Stands for kill -9: nothing of peftkit's may catch it."""


def run(
    make: Make, rows: Rows, folder: Path, loss: str, *, kill_after: int | None = None
) -> tuple[Tuned, Trained, Trace]:
    """One process of a run, as a fresh one would begin it."""
    newest = Checkpoints(folder).newest() if (folder / "trainer").exists() else None
    torch.manual_seed(1234 if newest else 0)  # a new process begins with another random state
    tuned = make(bits=4, lora_dropout=0.2)
    spec = PreferenceTrainSpec.model_validate({**SETTINGS, "loss": loss})
    paths, labelled = preference_paths(tuned, spec), loss == "kto"
    trace: Trace = {}

    def log(step: int, figures: dict[str, float]) -> None:
        if kill_after is not None and step > kill_after:
            raise Killed
        compared = {name: figures[name] for name in ("loss", "grad_norm", "held_out_nll") if name in figures}
        trace.setdefault(step, {}).update(compared)

    trained = train(
        tuned, reference_scored(tuned, rows(SHAPES, labelled=labelled), paths), spec, folder / "trainer",
        held_out=reference_scored(tuned, rows(SHAPES[:3], labelled=labelled, seed=1), paths),
        checkpoints=Checkpoints(folder), start=newest, paths=paths, log=log,
    )  # fmt: skip
    return tuned, trained, trace


@pytest.mark.parametrize(
    "loss", [pytest.param("dpo", marks=pytest.mark.full), pytest.param("orpo", marks=pytest.mark.full), "kto"]
)
def test_a_resumed_run_is_the_uninterrupted_one(tuned: Make, preferences: Rows, tmp_path: Path, loss: str) -> None:
    whole, done, trace = run(tuned, preferences, tmp_path / "whole", loss)
    assert done.steps == STEPS
    assert done.answer_tokens == 3 * len(SHAPES)  # what a step counts is pairs, or answers
    assert done.last_loss < done.first_loss
    with pytest.raises(Killed):
        run(tuned, preferences, tmp_path / "killed", loss, kill_after=2)
    resumed, again, rest = run(tuned, preferences, tmp_path / "killed", loss)
    assert again.steps == STEPS
    assert sorted(rest) == [3, 4]
    assert rest == {step: trace[step] for step in rest}
    for name, parameter in whole.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name


@pytest.mark.full
def test_the_base_is_what_it_was(tuned: Make, preferences: Rows, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tuned(bits=4).backbone.model.state_dict().items()}
    made, _, _ = run(tuned, preferences, tmp_path, "dpo")
    after = made.backbone.model.state_dict()
    base = [name for name in before if "lora_" not in name]
    assert len(base) > 10
    assert all(torch.equal(before[name], after[name]) for name in base)
