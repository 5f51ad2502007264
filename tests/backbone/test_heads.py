"""A task's head on a base: the base's own tensors are its files', and the head alone is drawn, from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from headed_lab import HEADS, PAIRS, batch_of, examples, load, write_bases
from safetensors.torch import load_file, save_file
from tiny_encoders import write_bert, write_image_base
from transformers import AutoModelForImageClassification

from peftkit.backbone.bnb import functional
from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.heads import head_parameters
from peftkit.backbone.load import Backbone
from peftkit.backbone.quantize import dense_weight, dequantize, quantize
from peftkit.base.head import Head
from peftkit.errors import BackboneError, BaseError


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


FIRST = [("bert", "sequence"), ("llama", "span"), ("vit", "image"), ("resnet", "image"), ("t5", "seq2seq")]
CASES = [
    pytest.param(*pair, bits, marks=[] if pair in FIRST and bits != 16 else pytest.mark.full)
    for pair in PAIRS
    for bits in (4, 8, 16, 32)
]


def of_files(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The tensors of the base's files, by their names in the model."""
    if backbone.model.config.model_type == "vit":  # transformers 5 renames them as it reads
        return dict(AutoModelForImageClassification.from_pretrained(str(backbone.base.folder)).state_dict())
    found = {}
    prefix, names = backbone.model.base_model_prefix, dict(backbone.model.state_dict(keep_vars=True))
    for name, value in load_file(backbone.base.folder / "model.safetensors").items():
        plain = f"{prefix}.{name.removeprefix('model.')}"
        found[name if name in names else plain] = value
    return found


def base_names(backbone: Backbone) -> list[str]:
    """Names of the model's parameters and saved buffers that are not the head's, nor marks of quantization."""
    heads = {*head_parameters(backbone.model)}
    saved = [*dict(backbone.model.named_parameters()), *dict(backbone.model.named_buffers())]
    return [name for name in saved if name not in heads and name in backbone.model.state_dict()]


@pytest.mark.parametrize(("base", "head", "bits"), CASES)
def test_the_base_is_its_files_bit_for_bit(bases: dict[str, Path], base: str, head: str, bits: int) -> None:
    backbone = load(bases[base], head, bits)
    files, packed = of_files(backbone), quantized_linears(backbone.model)
    names, held = base_names(backbone), backbone.model.state_dict()
    assert len(names) > 10
    for name in names:
        layer = packed.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(held[name], files[name].to(held[name].dtype)), name
        elif bits == 4:
            assert torch.equal(dense_weight(layer), dequantize(quantize(files[name]))), name
        else:
            codes, scales, _ = functional.int8_vectorwise_quant(files[name].half())  # upstream goes through float16
            assert torch.equal(layer.state.CB, codes), name
            assert torch.equal(layer.state.SCB, scales), name
    images = base in ("resnet", "efficientnet")  # all of convolutions
    assert bool(packed) is (bits < 16 and not images)
    assert not [name for name in head_parameters(backbone.model) if name.removesuffix(".weight") in packed]


@pytest.mark.parametrize(("base", "head"), PAIRS)
def test_the_head_is_drawn_from_the_seed(bases: dict[str, Path], base: str, head: str) -> None:
    before = torch.random.get_rng_state()
    models = [load(bases[base], head, seed=seed).model for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    heads = head_parameters(models[0])
    own = [{name: dict(model.named_parameters())[name] for name in heads} for model in models]
    assert all(torch.equal(own[0][name], own[1][name]) for name in heads)
    in_files = [name for name in heads if "pooler" in name]  # this BERT was saved with it
    drawn = [name for name in heads if name.endswith("weight") and name not in in_files]
    assert bool(drawn) is (head != "seq2seq")
    assert not any(torch.equal(own[0][name], own[2][name]) for name in drawn)
    assert all(torch.equal(own[0][name], own[2][name]) for name in in_files)


@pytest.mark.parametrize(("base", "head"), [("llama", "sequence"), ("llama", "span"), ("t5", "token")])
def test_no_keys_and_values_are_kept_for_tokens_that_never_come(bases: dict[str, Path], base: str, head: str) -> None:
    backbone = load(bases[base], head)
    batch = batch_of(backbone, examples(head, [6, 4]))
    del batch["labels"]
    with torch.no_grad():
        assert backbone.model(**batch).get("past_key_values") is None


def test_labels_stand_in_the_config(bases: dict[str, Path]) -> None:
    config = load(bases["bert"], "sequence").model.config
    assert config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert config.problem_type == "single_label_classification"
    assert load(bases["bert"], "number").model.config.problem_type == "regression"
    assert load(bases["bert"], "several").model.config.problem_type == "multi_label_classification"


def without(source: Path, folder: Path, *ends: str) -> Path:
    """A copy of a base without the tensors whose names end so."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith(ends)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_lost_tensor_is_no_head(bases: dict[str, Path], tmp_path: Path) -> None:
    broken = without(bases["bert"], tmp_path / "broken", "layer.1.output.dense.weight", "layer.0.output.dense.bias")
    for head in ("sequence", "token", "span"):
        with pytest.raises(BackboneError, match=r"lacks 2 tensors of the model: bert\.encoder\.layer\.0\.output"):
            load(broken, head)
    norms = without(bases["resnet"], tmp_path / "norms", "running_mean")
    with pytest.raises(BackboneError, match="lacks"):
        load(norms, "image")


def test_a_base_without_a_pooler_gets_one(bases: dict[str, Path], tmp_path: Path) -> None:
    bare = without(bases["bert"], tmp_path / "bare", "pooler.dense.weight", "pooler.dense.bias")
    first, second = (load(bare, "sequence", seed=seed).model.bert.pooler.dense.weight for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("count", [2, 3])
def test_a_base_of_another_task_gets_a_new_head(tmp_path: Path, count: int) -> None:
    """With another number of labels; with as many, the base's own head goes on, under the new names."""
    labels = ("a", "b", "c")
    base = write_bert(tmp_path / "tuned", labels=labels)
    head = Head("sequence", ("new", "newer", "newest")[:count])
    first, second = (load(base, head, seed=seed).model for seed in (0, 1))
    assert first.classifier.weight.shape == (count, 64)
    assert torch.equal(first.classifier.weight, second.classifier.weight) is (count == 3)
    assert first.config.id2label == dict(enumerate(head.labels))


def test_an_image_base_of_other_labels_gets_a_new_head(tmp_path: Path) -> None:
    base = write_image_base(tmp_path / "resnet", "resnet", labels=("cat", "dog"))
    assert load(base, "image").model.classifier[1].weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("base", "head"),
    [("llama", "image"), ("llama", "seq2seq"), ("bert", "seq2seq"), ("vit", "sequence"), ("t5", "image")],
)
def test_a_base_without_such_a_head_is_refused_by_name(bases: dict[str, Path], base: str, head: str) -> None:
    with pytest.raises(BackboneError, match=f"no {HEADS[head].kind} head for the model type '{base}'") as error:
        load(bases[base], head)
    assert error.value.expected.startswith("a base with one: ")


def test_a_known_type_without_a_token_head_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Phi-1 has a token head, and CTRL, of the same age, has none."""
    config = json.loads((bases["llama"] / "config.json").read_text())
    folder = without(bases["llama"], tmp_path / "ctrl", "norm.weight")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "ctrl"}))
    with pytest.raises(BackboneError, match="no token head for the model type 'ctrl'"):
        load(folder, "token")


def test_the_language_head_needs_a_stop_token(bases: dict[str, Path]) -> None:
    """An encoder's tokenizer has none; a head that writes no text asks for none."""
    with pytest.raises((BaseError, BackboneError)):
        load(bases["bert"], None)  # type: ignore[arg-type]
    assert load(bases["bert"], "token").tokenizer.stop_ids == ()
