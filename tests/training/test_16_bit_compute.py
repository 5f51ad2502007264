"""The path that a GPU takes, on a CPU: bfloat16 autocast around the forward pass, float32 adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.training.arguments import sft_arguments
from peftkit.training.schedule import schedule
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

ROWS = [
    Example(ids, [-100, *ids[1:]], 1, i, f"row {i}") for i, ids in enumerate([[1, 9, 8, 7], [1, 5, 6, 7, 8, 9], [1, 4]])
]


def tuned(tiny_base: Path, tmp_path: Path, bits: int) -> Tuned:
    quant = QuantSpec.model_validate({"bits": bits, "compute_dtype": "bfloat16", "device": "cpu"})
    return inject(load_backbone(BaseSpec(source=str(tiny_base)), quant, tmp_path / "cache"), AdapterSpec(r=4))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_checkpointing_and_micro_batches_change_nothing_but_rounding(
    tiny_base: Path, tmp_path: Path, bits: int
) -> None:
    found = []
    for checkpointing, size in ((False, 3), (True, 3), (False, 1)):
        model = tuned(tiny_base, tmp_path, bits)
        spec = TrainSpec(max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=3 // size,
                         gradient_checkpointing=checkpointing, learning_rate=1e-2)  # fmt: skip
        trained = train(model, ROWS, spec, tmp_path / "trainer")
        assert {p.dtype for p in model.trainable.values()} == {torch.float32}
        assert trained.last_loss < trained.first_loss
        found.append(trained)
    whole, checkpointed, split = (result.first_loss for result in found)
    assert checkpointed == whole  # the same arithmetic, done twice
    # bfloat16 keeps 8 bits: a relative 2⁻⁸ per product, averaged over the tokens of a step
    assert split == pytest.approx(whole, rel=2**-8)


def test_checkpointing_does_not_outlive_its_training(tiny_base: Path, tmp_path: Path) -> None:
    model = tuned(tiny_base, tmp_path, 4)
    train(model, ROWS, TrainSpec(max_steps=1, gradient_checkpointing=True), tmp_path / "trainer")
    assert not model.model.get_base_model().is_gradient_checkpointing


def test_several_visible_gpus_are_one_device_to_the_trainer(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = tuned(tiny_base, tmp_path, 4), TrainSpec(max_steps=1)
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    arguments = sft_arguments(model, schedule(ROWS, spec), spec, tmp_path, "adamw_torch")
    assert arguments._n_gpu == 1
