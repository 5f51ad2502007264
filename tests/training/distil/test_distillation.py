"""Distillation on tiny bases: it nears the teacher more than training alone, and is as repeatable as training is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.errors import TrainingError
from peftkit.generation.forward import pad
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.distil.paths import DistilPaths, distil_paths
from peftkit.training.distil.spec import DistilSpec
from peftkit.training.distil.teacher import Teacher, teacher_of
from peftkit.training.objective import objective
from peftkit.training.passes.trying import find_paths
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.sft import Trained, train
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

Rows = Callable[..., list[Example]]
SPEC = TrainSpec(
    num_train_epochs=2, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-2, save_steps=1,
    save_total_limit=100,
)  # fmt: skip
LENGTHS = (5, 9, 12, 7, 6, 11, 8, 13)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def larger(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper base with the same tokenizer, a padded vocabulary, and logits worth learning from."""
    return make_base(
        tmp_path_factory.mktemp("larger"), seed=5, hidden_size=128, num_hidden_layers=3, vocab_size=320,
        initializer_range=0.1,
    )  # fmt: skip


def backbone_of(folder: Path, cache: Path, bits: Any = 32) -> Backbone:
    return load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=bits), cache)


def student_of(
    base: Path, cache: Path, distil: DistilSpec, *, bits: Any = 32, registry: Registry | None = None, **adapter: Any
) -> tuple[Tuned, Teacher]:
    backbone = backbone_of(base, cache, bits)
    teacher = teacher_of(distil, backbone, cache, registry=registry)
    return inject(backbone, AdapterSpec(**{"r": 8, **adapter})), teacher


def distilled(
    base: Path, cache: Path, rows: list[Example], folder: Path, distil: DistilSpec, *, spec: TrainSpec = SPEC,
    teacher: Path | None = None, **options: Any,
) -> tuple[Tuned, Trained, DistilPaths]:  # fmt: skip
    """One run, begun as a fresh process would."""
    torch.manual_seed(0)
    bits = options.pop("bits", 32)
    distil = distil.model_copy(update={"teacher": str(teacher)}) if teacher else distil
    tuned, found = student_of(base, cache, distil, bits=bits, registry=options.pop("registry", None), lora_dropout=0.1)
    paths = distil_paths(tuned, found, distil, spec)
    return tuned, train(tuned, rows, spec, folder / "trainer", paths=paths, **options), paths


def values(tuned: Tuned) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}


def test_it_nears_the_teacher_more_than_training_alone(
    tiny_base: Path, larger: Path, cache: Path, rows: Rows, tmp_path: Path
) -> None:
    made, after, before = rows(LENGTHS), {}, 0.0
    longer = SPEC.model_copy(update={"num_train_epochs": 4})
    for weight in (0.0, 0.9):
        distil = DistilSpec(temperature=1, weight=weight, teacher_bits=32)
        tuned, trained, paths = distilled(
            tiny_base, cache, made, tmp_path / str(weight), distil, teacher=larger, spec=longer
        )
        with tuned.as_base() as base:
            before = paths.apart(tuned, base, made)
        after[weight] = paths.apart(tuned, tuned.model, made)
        assert trained.last_loss < trained.first_loss
    assert after[0.9] < before
    assert after[0.9] < after[0.0]


def test_without_weight_it_is_supervised_fine_tuning_bit_by_bit(
    tiny_base: Path, larger: Path, cache: Path, rows: Rows, tmp_path: Path
) -> None:
    tuned, trained, _ = distilled(
        tiny_base, cache, rows(LENGTHS), tmp_path / "kd", DistilSpec(weight=0, teacher_bits=32), teacher=larger
    )
    torch.manual_seed(0)
    alone = inject(backbone_of(tiny_base, cache), AdapterSpec(r=8, lora_dropout=0.1))
    paths = find_paths(alone, rows_as_batch=True)
    plain = train(alone, rows(LENGTHS), SPEC, tmp_path / "sft", paths=paths)
    assert (trained.first_loss, trained.last_loss) == (plain.first_loss, plain.last_loss)
    found, expected = values(tuned), values(alone)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_split_into_micro_batches_changes_no_gradient(
    tiny_base: Path, larger: Path, cache: Path, rows: Rows
) -> None:
    distil = DistilSpec(teacher=str(larger), weight=0.7, teacher_bits=32)
    tuned, teacher = student_of(tiny_base, cache, distil)
    paths = distil_paths(tuned, teacher, distil, SPEC)
    made, found = rows(LENGTHS), {}
    with torch.no_grad():  # B starts at 0: without it half of the gradients would be 0
        for parameter in tuned.trainable.values():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    for tokens in (1, 30, 10_000):
        step = Step(
            tuned.model, made, pad_id=2, device=tuned.backbone.device, paths=paths,
            objective=objective(tuned, RegularizeSpec(), paths),
        )  # fmt: skip
        result = step.run(tokens)
        gradients = {name: parameter.grad.clone() for name, parameter in tuned.trainable.items()}  # type: ignore[union-attr]
        found[result.micro_batches] = gradients
        step.rewind()
    assert len(found) == 3
    assert max(found) == len(made)
    for gradients in found.values():
        for name, expected in found[1].items():
            torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_a_resumed_run_is_the_uninterrupted_run(
    tiny_base: Path, larger: Path, cache: Path, rows: Rows, tmp_path: Path
) -> None:
    distil = DistilSpec(weight=0.8)
    whole = tmp_path / "whole"
    options: dict[str, Any] = {"teacher": larger, "bits": 4, "checkpoints": Checkpoints(whole)}
    tuned, trained, _ = distilled(tiny_base, cache, rows(LENGTHS), whole, distil, **options)
    start = Checkpoints(whole).load(2)
    options["checkpoints"] = Checkpoints(tmp_path / "again")
    again, resumed, _ = distilled(tiny_base, cache, rows(LENGTHS), tmp_path / "again", distil, start=start, **options)
    assert resumed.steps == trained.steps > 2
    assert resumed.last_loss == trained.last_loss
    found, expected = values(again), values(tuned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- adapters as teachers


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def publish(registry: Registry, backbone: Backbone, folder: Path, name: str = "tone") -> str:
    """An adapter that moves its base's logits a good deal."""
    from peftkit.recipe.fields import base_fields

    tuned = inject(backbone, AdapterSpec(r=4))
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    fields = {"kind": "peft", "base": base_fields(backbone), "adapter": tuned.spec.model_dump()}
    payload = save_adapter(tuned, folder)
    return registry.publish(name, payload, Draft.model_validate(fields), base=backbone.identity.record).reference


def logits_of(model: Any, row: Example) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([row.input_ids])).logits
    return logits


def test_an_adapter_of_the_same_base_teaches_over_the_same_tensors(
    tiny_base: Path, cache: Path, rows: Rows, registry: Registry, tmp_path: Path
) -> None:
    made = rows(LENGTHS)
    first = backbone_of(tiny_base, cache)
    reference = publish(registry, first, tmp_path / "payload")
    distil = DistilSpec(teacher="tone", temperature=1, weight=1.0)
    tuned, teacher = student_of(tiny_base, cache, distil, registry=registry)
    assert teacher.name == reference
    assert teacher.backbone is tuned.backbone
    base = {id(tensor) for tensor in tuned.backbone.model.parameters() if not tensor.requires_grad}
    own = [tensor for name, tensor in teacher.model.named_parameters() if "lora_" not in name]
    assert own
    assert all(id(tensor) in base for tensor in own)
    was = logits_of(teacher.model, made[0])
    assert torch.equal(was, logits_of(first.model, made[0])), "the backbone that it was made in still carries it"
    paths = distil_paths(tuned, teacher, distil, SPEC)
    assert any("tone@" in name for name in paths.names)
    before = paths.apart(tuned, tuned.model, made)
    trained = train(tuned, made, SPEC.model_copy(update={"num_train_epochs": 4}), tmp_path / "trainer", paths=paths)
    assert paths.apart(tuned, tuned.model, made) < 0.8 * before
    assert trained.steps == 6
    assert torch.equal(was, logits_of(teacher.model, made[0])), "training leaves the teacher as it was"


def test_an_adapter_of_another_base_brings_its_base(
    tiny_base: Path, larger: Path, cache: Path, rows: Rows, registry: Registry, tmp_path: Path
) -> None:
    other = backbone_of(larger, cache)
    publish(registry, other, tmp_path / "payload")
    distil = DistilSpec(teacher="tone@latest", teacher_bits=32)
    tuned, teacher = student_of(tiny_base, cache, distil, registry=registry)
    assert teacher.backbone is not tuned.backbone
    assert teacher.record()["base"] == other.identity.fingerprint
    row = rows((12,))[0]
    assert torch.allclose(logits_of(teacher.model, row), logits_of(other.model, row), atol=1e-5)


# -- precision, mode, refusals


@pytest.mark.parametrize("bits", [4, 32])
def test_a_teacher_computes_in_its_own_precision_inside_the_students(
    tiny_base: Path, larger: Path, cache: Path, rows: Rows, bits: Any
) -> None:
    distil = DistilSpec(teacher=str(larger), teacher_bits=bits)
    _tuned, teacher = student_of(tiny_base, cache, distil)
    teacher.model.train()
    batch = pad(rows((9, 14)), 2, torch.device("cpu"))
    alone = teacher.score(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.score(batch)
        some = inside.logits(inside.states)
    assert not teacher.model.training
    assert torch.equal(alone.states, inside.states)
    assert torch.equal(alone.logits(alone.states), some)
    assert not alone.states.requires_grad
    plain = teacher.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labelled = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(some, plain[labelled].float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(alone.targets, batch["labels"][:, 1:][labelled])


def test_another_vocabulary_is_refused_by_its_tokens(
    tiny_base: Path, larger: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(larger, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = (token for token, at in vocabulary.items() if at in (40, 41))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    backbone = backbone_of(tiny_base, cache)
    with pytest.raises(TrainingError, match=rf"another vocabulary than .*only one of them has '{re.escape(one)}' = 40"):
        teacher_of(DistilSpec(teacher=str(other)), backbone, cache)
    # Text that is cut otherwise into the same tokens is the student's concern alone.
    tokenizer["model"]["vocab"] = {**vocabulary, one: 40, two: 41}
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert teacher_of(DistilSpec(teacher=str(other)), backbone, cache).name == str(other)


def test_what_does_not_go_together_is_refused(tiny_base: Path, larger: Path, cache: Path) -> None:
    distil = DistilSpec(teacher=str(larger))
    backbone = backbone_of(tiny_base, cache)
    with pytest.raises(TrainingError, match=r"distil\.teacher is not set"):
        teacher_of(DistilSpec(), backbone, cache)
    tuned, teacher = student_of(tiny_base, cache, distil)
    with pytest.raises(TrainingError, match="trunk_cache does not go"):
        distil_paths(tuned, teacher, distil, TrainSpec(trunk_cache=True))
    paths = distil_paths(tuned, teacher, distil, SPEC)
    for regularize in (RegularizeSpec(label_smoothing=0.1), RegularizeSpec(r_drop=1.0)):
        with pytest.raises(TrainingError, match="does not go with distillation"):
            paths.loss(regularize)
