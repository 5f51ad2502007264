"""The loss and every gradient of a step are those of TRL's own trainers on the same batch, in float32 within 1e-5.

TRL's trainers are built and asked for their loss; nothing of them is replaced. Where peftkit means something else on
purpose (the NLL beside the odds), the batch is one in which both mean the same, and a ragged one shows the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from peftkit.data.preference.example import PreferenceExample
from peftkit.training.objective import objective
from peftkit.training.preference.paths import PreferencePaths, preference_paths
from peftkit.training.preference.reference import reference_scored
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.step import Step

Make = Callable[..., Any]
Rows = Callable[..., list[PreferenceExample]]
Found = tuple[float, dict[str, torch.Tensor]]

RAGGED = ((5, 7, 3), (9, 2, 12), (4, 16, 16), (11, 6, 9), (7, 3, 4))
EVEN = ((1, 8, 5), (1, 8, 11), (1, 8, 3))
"""One prompt token, which nothing predicts, and better answers of one length: all means over tokens are the same."""
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: None)


def gradients(tuned: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in tuned.trainable.items() if p.grad is not None}
    for parameter in tuned.trainable.values():
        parameter.grad = None
    return found


def ours(tuned: Any, rows: Sequence[PreferenceExample], spec: PreferenceTrainSpec, tokens: int = 10_000) -> Found:
    """Loss and gradients of one step of ours, with the shortcuts that a run takes."""
    paths: PreferencePaths = preference_paths(tuned, spec)
    scored = reference_scored(tuned, rows, paths)
    tuned.model.train()
    options: dict[str, Any] = {"pad_id": 2, "device": torch.device("cpu")}
    ready = paths.prepared(tuned.model, scored, tokens, **options)
    scores = objective(tuned, spec.regularize, paths)
    result = Step(tuned.model, ready, paths=paths, objective=scores, **options).run(tokens)
    return result.loss, gradients(tuned)


def arguments(kind: Any, folder: Path, **settings: Any) -> Any:
    return kind(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None,
        gradient_checkpointing=False, per_device_train_batch_size=8, **settings,
    )  # fmt: skip


def trl_loss(trainer: Any, tuned: Any, inputs: dict[str, Any]) -> Found:
    tuned.model.delete_adapter("ref")  # upstream's copy of a given adapter; without it the reference is the base
    tuned.model.train()
    loss = trainer.compute_loss(tuned.model, inputs)
    loss.backward()
    return float(loss.detach()), gradients(tuned)


def of_pair(row: PreferenceExample) -> dict[str, list[int]]:
    assert row.rejected is not None
    start = row.chosen.answer_start
    return {
        "prompt_ids": row.prompt_ids,
        "chosen_ids": row.chosen.input_ids[start:],
        "rejected_ids": row.rejected.input_ids[start:],
    }


def pairs_as_text() -> Dataset:
    """What a trainer is built with; the batches that are compared do not come from it."""
    return Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]})


def trl_dpo(tuned: Any, rows: Sequence[PreferenceExample], folder: Path, **settings: Any) -> Found:
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        tuned.model, args=arguments(DPOConfig, folder, **settings), train_dataset=pairs_as_text(),
        processing_class=tuned.backbone.tokenizer.hf,
    )  # fmt: skip
    return trl_loss(trainer, tuned, trainer.data_collator([of_pair(row) for row in rows]))


def agree(first: Found, second: Found, within: float = CLOSE) -> None:
    assert first[0] == pytest.approx(second[0], rel=within, abs=within)
    assert first[1].keys() == second[1].keys()
    assert len(first[1]) > 8
    for name, gradient in first[1].items():
        scale = second[1][name].norm()
        assert scale > 0
        assert float((gradient - second[1][name]).norm() / scale) <= within, name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"beta": 0.5, "loss_type": "hinge"}, marks=pytest.mark.full),
        pytest.param({"beta": 0.3, "loss_type": "ipo"}, marks=pytest.mark.full),
        pytest.param({"loss_type": "robust", "label_smoothing": 0.2}, marks=pytest.mark.full),
    ],
)
def test_dpo(adapted: Make, preferences: Rows, tmp_path: Path, settings: dict[str, Any]) -> None:
    tuned, rows = adapted(bits=32), preferences(RAGGED)
    found = ours(tuned, rows, PreferenceTrainSpec(**settings))
    upstream = {**settings, "loss_type": [settings.get("loss_type", "sigmoid")]}
    agree(found, trl_dpo(tuned, rows, tmp_path, **{"beta": 0.1, **upstream}))


@pytest.mark.full
def test_dpo_with_the_nll_of_better_answers(adapted: Make, preferences: Rows, tmp_path: Path) -> None:
    tuned = adapted(bits=32)
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1}
    spec = PreferenceTrainSpec(sft_weight=0.7)
    agree(ours(tuned, preferences(EVEN), spec), trl_dpo(tuned, preferences(EVEN), tmp_path, **both))
    # A mean over the batch's tokens weighs long answers more; per pair it is what the paper has.
    ragged = ours(tuned, preferences(RAGGED), spec)[0], trl_dpo(tuned, preferences(RAGGED), tmp_path, **both)[0]
    assert abs(ragged[0] - ragged[1]) > 1e-4


def orpo_batch(rows: Sequence[PreferenceExample]) -> dict[str, torch.Tensor]:
    """What TRL's ORPO trainer makes of pairs: both sides padded on the right, prompts without labels."""
    from peftkit.generation.forward import pad

    batch = {}
    for side in ("chosen", "rejected"):
        padded = pad([getattr(row, side) for row in rows], 2, torch.device("cpu"))
        batch |= {f"{side}_{name}": value for name, value in padded.items()}
    return batch


def trl_orpo(tuned: Any, folder: Path) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(
        tuned.model, args=arguments(ORPOConfig, folder, beta=0.3), train_dataset=pairs_as_text(),
        processing_class=tuned.backbone.tokenizer.hf,
    )  # fmt: skip


@pytest.mark.full
def test_orpo(adapted: Make, preferences: Rows, tmp_path: Path) -> None:
    tuned, rows = adapted(bits=32), preferences(EVEN)
    found = ours(tuned, rows, PreferenceTrainSpec(loss="orpo", beta=0.3))
    trainer = trl_orpo(tuned, tmp_path)
    tuned.model.train()
    loss, _ = trainer.get_batch_loss_metrics(tuned.model, orpo_batch(rows))
    loss.backward()
    agree(found, (float(loss.detach()), gradients(tuned)))


def test_orpo_of_ragged_pairs_has_their_odds_and_the_nll_of_answers(
    adapted: Make, preferences: Rows, tmp_path: Path
) -> None:
    tuned, rows = adapted(bits=32), preferences(RAGGED)
    found = ours(tuned, rows, PreferenceTrainSpec(loss="orpo", beta=0.3))
    trainer = trl_orpo(tuned, tmp_path)
    tuned.model.train()
    chosen, rejected, _, _, over_all = trainer.concatenated_forward(tuned.model, orpo_batch(rows))
    odds, *_ = trainer.odds_ratio_loss(chosen, rejected)
    loss = -chosen.mean() - odds.mean()
    loss.backward()
    agree(found, (float(loss.detach()), gradients(tuned)))
    assert abs(float(over_all.detach() + chosen.mean().detach())) > 1e-3  # TRL's NLL has the prompts in it


def of_labelled(row: PreferenceExample) -> dict[str, Any]:
    assert row.mismatched is not None
    start = row.chosen.answer_start
    return {
        "prompt_ids": row.prompt_ids,
        "completion_ids": row.chosen.input_ids[start:],
        "KL_completion_ids": row.mismatched.input_ids[start:],
        "label": row.desirable,
    }


@pytest.mark.parametrize(("sign", "above"), [pytest.param(1, False, marks=pytest.mark.full), (-1, True)])
def test_kto(adapted: Make, preferences: Rows, tmp_path: Path, sign: int, above: bool) -> None:
    """`sign` turns the adapter round, so that the divergence is positive once, and below zero and cut off once."""
    from trl import KTOConfig, KTOTrainer

    tuned, rows = adapted(bits=32), preferences(RAGGED, labelled=True)
    with torch.no_grad():
        for name, parameter in tuned.trainable.items():
            parameter.mul_(sign if "lora_B" in name else 1)
    weights = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    found = ours(tuned, rows, PreferenceTrainSpec(loss="kto", **weights))
    trainer = KTOTrainer(
        tuned.model, args=arguments(KTOConfig, tmp_path, **weights), processing_class=tuned.backbone.tokenizer.hf,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}),
    )  # fmt: skip
    agree(found, trl_loss(trainer, tuned, trainer.data_collator([of_labelled(row) for row in rows])))
    paths = preference_paths(tuned, PreferenceTrainSpec(loss="kto", **weights))
    scored = reference_scored(tuned, rows, paths)
    ready = paths.prepared(tuned.model, scored, 1000, pad_id=2, device=torch.device("cpu"))
    (divergence,) = {row.divergence for row in ready}
    assert divergence is not None
    assert (divergence > 0) is above
