"""Adapters on a base with a task's head: trained with the head, kept, brought back bit for bit; the base as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from headed_lab import HEADS, examples, load, pixels, scores, write_bases
from peft import PeftModel
from safetensors.torch import load_file

from peftkit.backbone.contain import base_tensors, quantized_linears
from peftkit.backbone.heads import head_modules, head_parameters, model_class
from peftkit.backbone.load import Backbone
from peftkit.base.head import Head
from peftkit.errors import TuningError
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.training.sft import Trained, train
from peftkit.training.spec import TrainSpec
from peftkit.training.tasks.paths import task_paths
from peftkit.tuning.attach import attach, open_adapters, resume_adapter
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.tuned import Tuned

LENGTHS = (9, 14, 11, 7)
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"r": 4} for name, method in METHODS.items() if "r" in method.fields},
    "adalora": {"r": 4, "init_r": 6},
    "patterns": {"patterns": ["*orm*"]},
    "top_layers": {"top_layers": 1},
}
NAMES = [name for name in METHODS if name not in ("prompt_tuning", "prefix_tuning", "trainable_tokens")]
BERT_IA3 = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
QUICK = {
    ("bert", "sequence", "lora"),
    ("bert", "sequence", "top_layers"),
    ("llama", "span", "lora"),
    ("resnet", "image", "lora"),
}
NOT_OF_CONVOLUTIONS = ("loftq", "vera", "pissa", "eva")
"""No packed layers; no such layers in PEFT; a first layer of three channels has no four directions; no tokens."""
CASES = [
    pytest.param(base, head, name, marks=[] if (base, head, name) in QUICK else pytest.mark.full)
    for base, head in (
        ("bert", "sequence"), ("bert", "several"), ("bert", "number"), ("bert", "token"), ("llama", "sequence"),
        ("llama", "span"), ("vit", "image"), ("resnet", "image"), ("efficientnet", "image"), ("t5", "seq2seq"),
    )
    for name in NAMES
    if not (base in ("resnet", "efficientnet") and name in NOT_OF_CONVOLUTIONS)
    and not (head in ("image", "seq2seq") and name == "eva")
    and (base, name) not in {("t5", "bias_only"), ("t5", "ia3"), ("vit", "ia3"), ("llama", "bias_only")}
    and (base, name) != ("vit", "loftq")  # its files have other names than its modules, and loftq says so
    and (head, name) != ("span", "loftq")
]  # fmt: skip
STATISTICS = {("efficientnet", "full"), ("resnet", "top_layers")}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


def spec_of(base: str, name: str, **more: Any) -> AdapterSpec:
    settings = {**SETTINGS.get(name, {}), **more}
    if base in ("resnet", "efficientnet") and "target_modules" in METHODS[name].fields:  # type: ignore[index]
        settings = {"target_modules": ["convolution"], **settings}
    if name == "ia3":
        settings |= BERT_IA3 if base == "bert" else {}
        settings |= {"feedforward_modules": []} if base in ("resnet", "efficientnet") else {}
    return AdapterSpec.model_validate({"method": name, **settings})


def bits_of(base: str, name: str) -> int:
    able = METHODS[name].bits  # type: ignore[index]
    return 32 if base in ("resnet", "efficientnet") else min(able)


def trained(tuned: Tuned, head: str, folder: Path, **settings: Any) -> Trained:
    rows = examples(head, LENGTHS)
    spec = TrainSpec.model_validate(
        {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_train_epochs": 9,
         "learning_rate": 1e-2} | settings
    )  # fmt: skip
    return train(tuned, rows, spec, folder / "trainer", paths=task_paths(tuned, spec, rows, pixels))


def held(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Every byte of the base, by names without what PEFT puts around layers."""
    tensors = base_tensors(backbone.model).items()
    return {name.replace(".base_layer", "").replace(".original_module", ""): value.clone() for name, value in tensors}


def published(tuned: Tuned, head: Head, folder: Path, name: str = "task") -> Version:
    payload = save_adapter(tuned, folder / "payload" / name)
    adapter = {**tuned.spec.record(), "head": head.record()}
    fields = {"kind": tuned.kind, "base": base_fields(tuned.backbone), "adapter": adapter}
    draft, record = Draft.model_validate(fields), tuned.backbone.identity.record
    return Registry(folder / "registry").publish(name, payload, draft, base=record)


@pytest.mark.parametrize(("base", "head", "name"), CASES)
def test_trained_kept_and_brought_back(bases: dict[str, Path], tmp_path: Path, base: str, head: str, name: str) -> None:
    bits, rows = bits_of(base, name), examples(head, LENGTHS)
    backbone = load(bases[base], head, bits)
    before, untouched = held(backbone), scores(backbone.model, backbone, rows)
    tuned = inject(backbone, spec_of(base, name), rows=rows)
    start = {key: value.detach().clone() for key, value in tuned.trainable.items()}
    result = trained(tuned, head, tmp_path, **({"learning_rate": 1e-3} if name == "oft" else {}))
    assert result.steps == 3
    assert 0 < result.last_loss < 1000  # a random net of convolutions begins at 140
    moved = [key for key, value in tuned.trainable.items() if not torch.equal(value, start[key])]
    heads = head_parameters(backbone.model)
    plain = {key.replace(".modules_to_save.default", "").replace("base_model.model.", "") for key in moved}
    assert {key.replace(".original_module", "") for key in heads if "modules_to_save" not in key} <= plain
    assert len(moved) >= len(start) / 2  # of loha the half that is not multiplied by zeros moves first
    after = held(backbone)
    assert before.keys() <= after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    with tuned.as_base() as model:
        assert torch.equal(scores(model, backbone, rows), untouched)
    found = scores(tuned.model, backbone, rows)
    assert not torch.allclose(found, untouched)
    again = load(bases[base], head, bits)
    host = attach(again, published(tuned, HEADS[head], tmp_path))
    if name == "adalora":  # stored without the directions that it has given up: sums of fewer numbers
        torch.testing.assert_close(scores(host.model, again, rows), found, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(scores(host.model, again, rows), found)
    host.activate(None)
    assert torch.equal(scores(host.model, again, rows), untouched)


@pytest.mark.parametrize(
    ("base", "head", "name"),
    [
        pytest.param(base, "image", name, marks=[] if (base, name) in STATISTICS else pytest.mark.full)
        for base in ("resnet", "efficientnet")
        for name in ("top_layers", "full", "norms", "lora")
    ],
)
def test_statistics_of_batch_norms_stay_the_files_own(
    bases: dict[str, Path], tmp_path: Path, base: str, head: str, name: str
) -> None:
    """The trained model's own too, which the base's bytes do not show where they are copies."""
    backbone = load(bases[base], head)
    files = load_file(bases[base] / "model.safetensors")
    tuned = inject(backbone, spec_of(base, name, **({"top_layers": 0} if name == "top_layers" else {})))
    trained(tuned, head, tmp_path)
    buffers = {key.removeprefix("base_model.model."): value for key, value in tuned.model.named_buffers()}
    statistics = [key for key in files if key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(statistics) >= 15
    assert [key for key in statistics if not torch.equal(buffers[key], files[key])] == []
    if name == "top_layers":
        assert not [key for key in tuned.names if ".stages." in key or ".blocks." in key]


@pytest.mark.parametrize(
    ("base", "head"),
    [("bert", "sequence"), pytest.param("vit", "image", marks=pytest.mark.full),
     pytest.param("resnet", "image", marks=pytest.mark.full), pytest.param("bert", "token", marks=pytest.mark.full),
     pytest.param("bert", "span", marks=pytest.mark.full), pytest.param("llama", "sequence", marks=pytest.mark.full),
     pytest.param("t5", "seq2seq", marks=pytest.mark.full),
     pytest.param("llama", "token", marks=pytest.mark.full),
     pytest.param("efficientnet", "image", marks=pytest.mark.full)],
)  # fmt: skip
def test_peft_alone_reads_it(bases: dict[str, Path], tmp_path: Path, base: str, head: str) -> None:
    backbone, rows = load(bases[base], head), examples(head, LENGTHS)
    tuned = inject(backbone, spec_of(base, "lora"))
    trained(tuned, head, tmp_path)
    found = scores(tuned.model, backbone, rows)
    version = published(tuned, HEADS[head], tmp_path)
    options = {"num_labels": len(HEADS[head].labels)} if HEADS[head].labels else {}
    kind = getattr(transformers, model_class(HEADS[head]).__name__)
    plain = kind.from_pretrained(str(bases[base]), ignore_mismatched_sizes=True, **options)
    if base == "llama":
        plain.config.pad_token_id = 2
    model = PeftModel.from_pretrained(plain, str(version.path))
    assert torch.equal(scores(model, backbone, rows), found)


def test_the_head_is_float32_over_4_bits(bases: dict[str, Path]) -> None:
    for base, head in (("bert", "sequence"), ("llama", "token")):
        tuned = inject(load(bases[base], head, 4), spec_of(base, "lora"))
        assert len(quantized_linears(tuned.model)) in (12, 14)
        assert {value.dtype for value in tuned.trainable.values()} == {torch.float32}
        own = [key for key in tuned.names if "modules_to_save" in key]
        assert len(own) == len(head_parameters(load(bases[base], head).model)) == (4 if base == "bert" else 2)
        assert not [key for key in tuned.names if "lora_" in key and ("pooler" in key or "score" in key)]


@pytest.mark.full
def test_adapters_of_one_task_swap_their_heads_too(bases: dict[str, Path], tmp_path: Path) -> None:
    rows, versions, alone = examples("sequence", LENGTHS), [], []
    for seed in (1, 2):
        backbone = load(bases["bert"], "sequence", 4, seed=seed)
        tuned = inject(backbone, spec_of("bert", "lora", seed=seed))
        trained(tuned, "sequence", tmp_path)
        alone.append(scores(tuned.model, backbone, rows))
        versions.append(published(tuned, HEADS["sequence"], tmp_path, f"task-{seed}"))
    host = open_adapters(versions, tmp_path / "cache", base=str(bases["bert"]))
    for index in (0, 1, 0):
        host.activate(f"task-{index + 1}")
        assert torch.equal(scores(host.model, host.backbone, rows), alone[index])


def test_another_head_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = inject(load(bases["bert"], "sequence"), spec_of("bert", "lora"))
    version = published(tuned, HEADS["sequence"], tmp_path)
    for other in (Head("sequence", ("blue", "green", "red")), Head("sequence", ("red", "green")), HEADS["token"]):
        with pytest.raises(TuningError, match="was trained with a sequence head of 3 labels, and this backbone has"):
            attach(load(bases["bert"], other), version)
    with pytest.raises(TuningError, match="this backbone has a token head of 3 labels"):
        resume_adapter(load(bases["bert"], "token"), version, AdapterSpec())


@pytest.mark.full
@pytest.mark.parametrize("name", ["lora", "top_layers"])
def test_training_goes_on_from_a_version(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Bit for bit from where it was: the head included."""
    backbone, rows = load(bases["bert"], "sequence"), examples("sequence", LENGTHS)
    tuned = inject(backbone, spec_of("bert", name))
    trained(tuned, "sequence", tmp_path)
    found = scores(tuned.model, backbone, rows)
    again = load(bases["bert"], "sequence", seed=9)
    going = resume_adapter(again, published(tuned, HEADS["sequence"], tmp_path), AdapterSpec())
    assert torch.equal(scores(going.model, again, rows), found)
    assert {*going.names} == {*tuned.names}
    trained(going, "sequence", tmp_path)
    assert not torch.equal(scores(going.model, again, rows), found)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "trainable_tokens"])
def test_methods_of_the_language_head_are_refused(bases: dict[str, Path], name: str) -> None:
    settings = {"tokens": [50]} if name == "trainable_tokens" else {}
    with pytest.raises(TuningError, match=f"adapter.method={name} goes with a language head"):
        inject(load(bases["bert"], "sequence"), AdapterSpec.model_validate({"method": name, **settings}))


@pytest.mark.parametrize(
    ("base", "head", "what"), [("vit", "image", "images"), ("t5", "seq2seq", "an encoder-decoder")]
)
def test_eva_needs_one_text_a_row(bases: dict[str, Path], base: str, head: str, what: str) -> None:
    with pytest.raises(TuningError, match=f"method=eva reads rows as tokens of one text, which {what}"):
        inject(load(bases[base], head), spec_of(base, "eva"), rows=examples(head, LENGTHS))


def test_a_net_of_convolutions_has_no_linear_layers(bases: dict[str, Path]) -> None:
    backbone = load(bases["resnet"], "image")
    with pytest.raises(TuningError, match="has no linear layers but its head's") as error:
        inject(backbone, AdapterSpec(r=4))
    assert "convolution" in str(error.value.expected)
    assert head_modules(backbone.model) == ("classifier",)


def test_dropout_drops_where_something_is_trained(bases: dict[str, Path]) -> None:
    """A frozen part of an image model gives the same features every time; an adapter's own dropout is asked for."""
    backbone, rows, spec = load(bases["vit"], "image"), examples("image", LENGTHS), TrainSpec()
    tuned = inject(backbone, spec_of("vit", "lora", lora_dropout=0.5, layers="top:1"))
    task_paths(tuned, spec, rows, pixels).begin(tuned.model)
    drops = {
        key: module.training for key, module in tuned.model.named_modules() if isinstance(module, torch.nn.Dropout)
    }
    assert {key for key, training in drops.items() if training} >= {key for key in drops if "lora_dropout" in key}
    assert len([key for key in drops if "lora_dropout" in key]) == 6
    assert not [key for key, training in drops.items() if training and (".layers.0." in key or "embeddings" in key)]
