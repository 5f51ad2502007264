"""Adapters of tasks are merged with their heads added, and every other verb keeps the head or says why it cannot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import headed_lab
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peftkit.backbone.heads import head_parameters, model_class
from peftkit.backbone.load import Backbone
from peftkit.base.dense import dense_tensors
from peftkit.base.head import Head
from peftkit.deltas.combining.methods import How
from peftkit.deltas.compare import compare_deltas
from peftkit.deltas.previewing.preview import preview
from peftkit.deltas.reading.read import deltas_of
from peftkit.errors import DeltaError, TuningError
from peftkit.generation.opening import find_base
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.release.combine import combine_adapters
from peftkit.release.export.entry import export_for
from peftkit.release.merge import Order, merge_adapters
from peftkit.tuning.attach import attach
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.stored import read

LORA = {"method": "lora", "r": 4}
CONV = LORA | {"target_modules": ["convolution"]}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("bert", head, LORA) for head in ("sequence", "several", "number", "token", "span")),
    *(("llama", head, LORA) for head in ("sequence", "token", "span")),
    ("bert", "sequence", {"method": "top_layers", "top_layers": 1}),
    ("bert", "token", {"method": "bias_only"}),
    ("llama", "sequence", {"method": "full"}),
    ("vit", "image", LORA),
    ("resnet", "image", {"method": "bias_only"}),
    ("efficientnet", "image", {"method": "top_layers", "top_layers": 0}),
    ("t5", "seq2seq", LORA),
]

QUICK = (0, 6, 12)
"""One encoder, one causal base and one image net; the others take as long again each."""


@dataclass
class Lab:
    """A registry with adapters whose every tensor was moved, as by training."""

    root: Path
    bases: dict[str, Path]
    registry: Registry = field(init=False)
    cache: Path = field(init=False)

    def __post_init__(self) -> None:
        self.registry = Registry(self.root / "registry")
        self.cache = self.bases["bert"].parent / "cache"

    @property
    def places(self) -> dict[str, Path]:
        return {"cache": self.cache, "runs": self.root / "runs"}

    def make(
        self,
        base: str,
        head: str | Head,
        settings: dict[str, Any],
        *,
        bits: int = 32,
        name: str = "part",
        seed: int = 1,
    ) -> tuple[Backbone, Version]:
        backbone = headed_lab.load(self.bases[base], head, bits)
        self.cache = self.bases[base].parent / "cache"
        tuned = inject(backbone, AdapterSpec(**settings))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in tuned.model.parameters():
                if each.requires_grad:
                    each += 0.1 * torch.randn(each.shape, generator=draw)
        payload = self.root / "payloads" / name
        save_adapter(tuned, payload)
        identity, own = backbone.identity, backbone.head
        assert own is not None
        kind = "peft" if (payload / "adapter_config.json").exists() else "tensors"
        draft = Draft(
            kind=kind,
            base={
                "source": backbone.base.portable, "record": identity.id, "fingerprint": identity.fingerprint,
                "parts": identity.parts(), "quantization": backbone.quantization_record(),
            },
            adapter={"method": settings["method"], "head": own.record()},
        )  # fmt: skip
        clean = headed_lab.load(self.bases[base], head, bits)
        return clean, self.registry.publish(name, payload, draft, base=identity.record)

    def merge(self, name: str = "part", out: str = "merged", **order: Any) -> dict[str, Any]:
        asked = {"onto": "original", **order}
        return merge_adapters(self.registry, Order([(name, 1.0)], **asked), self.root / out, **self.places).as_record()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return headed_lab.write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def lab(tmp_path: Path, bases: dict[str, Path]) -> Lab:
    return Lab(tmp_path, bases)


def loaded(folder: Path, head: Head) -> tuple[Any, dict[str, Any]]:
    """As anyone loads it: transformers alone."""
    model, info = model_class(head).from_pretrained(str(folder), output_loading_info=True, dtype=torch.float32)
    return model.eval(), info


def assert_whole(info: dict[str, Any]) -> None:
    """Nothing was drawn, and nothing was left over."""
    assert {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]} == {}


@pytest.mark.parametrize(
    ("base", "head", "settings"),
    [pytest.param(*case, marks=[] if at in QUICK else pytest.mark.full) for at, case in enumerate(CASES)],
)
def test_a_merged_task_model_is_base_plus_adapter(lab: Lab, base: str, head: str, settings: dict[str, Any]) -> None:
    backbone, version = lab.make(base, head, settings)
    receipt = lab.merge()
    own = headed_lab.HEADS[head]
    merged, info = loaded(lab.root / "merged", own)
    assert_whole(info)
    rows = headed_lab.examples(head, (9, 5, 7))
    attached = headed_lab.scores(attach(backbone, version).model, backbone, rows)
    plain = headed_lab.scores(backbone.model, backbone, rows)
    size = max(1.0, float(attached.abs().max()))
    torch.testing.assert_close(headed_lab.scores(merged, backbone, rows), attached, rtol=0, atol=1e-5 * size)
    assert (attached - plain).abs().max() > 1e-3
    config = json.loads((lab.root / "merged" / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__]
    if own.labels:
        assert [merged.config.id2label[at] for at in range(len(own.labels))] == list(own.labels)
        assert merged.config.label2id == {label: at for at, label in enumerate(own.labels)}
    added = receipt["head"]["added"]
    assert set(added) <= set(head_parameters(merged)) - receipt["tensors"].keys()
    assert set(merged.state_dict()) >= receipt["tensors"].keys() > set()


def test_names_without_the_models_prefix_and_tensors_it_has_no_place_for(lab: Lab, tmp_path: Path) -> None:
    from headed_lab import write_base

    folder = write_base(tmp_path / "untied", tie_word_embeddings=False)
    assert "lm_head.weight" in dense_tensors(folder)
    assert not any(name.startswith("bert.") for name in dense_tensors(lab.bases["bert"]))
    lab.bases = lab.bases | {"untied": folder}
    lab.make("untied", "sequence", LORA)
    receipt = lab.merge()
    assert receipt["head"]["left_out"] == ["lm_head.weight"]
    assert receipt["head"]["added"] == ["score.weight"]
    _, info = loaded(lab.root / "merged", headed_lab.HEADS["sequence"])
    assert_whole(info)


@pytest.mark.full
def test_a_base_that_classified_with_other_labels_gives_its_head_up(lab: Lab, tmp_path: Path) -> None:
    from tiny_encoders import write_bert

    lab.bases = lab.bases | {"used": write_bert(tmp_path / "used", labels=("a", "b"))}
    backbone, version = lab.make("used", "sequence", LORA)
    receipt = lab.merge()
    assert receipt["head"]["added"] == ["classifier.bias", "classifier.weight"]
    merged, info = loaded(lab.root / "merged", headed_lab.HEADS["sequence"])
    rows = headed_lab.examples("sequence", (9, 5))
    attached = headed_lab.scores(attach(backbone, version).model, backbone, rows)
    torch.testing.assert_close(headed_lab.scores(merged, backbone, rows), attached, rtol=1e-5, atol=1e-5)
    assert not info["mismatched_keys"]


@pytest.mark.full
@pytest.mark.parametrize(("base", "head"), [("bert", "sequence"), ("llama", "sequence"), ("llama", "span")])
def test_onto_dequantized_is_what_training_computed(lab: Lab, base: str, head: str) -> None:
    backbone, version = lab.make(base, head, LORA, bits=4)
    receipt = lab.merge(onto="dequantized", written={"dtype": "float32"})
    merged, _ = loaded(lab.root / "merged", headed_lab.HEADS[head])
    rows = headed_lab.examples(head, (9, 5, 7))
    attached = headed_lab.scores(attach(backbone, version).model, backbone, rows)
    torch.testing.assert_close(headed_lab.scores(merged, backbone, rows), attached, rtol=1e-4, atol=1e-4)
    measured = receipt["model"][version.reference]
    assert measured["outputs"]["largest"] < 1e-3 < measured["outputs"]["size"]


@pytest.mark.full
def test_the_receipt_measures_outputs_and_sees_another_base(lab: Lab) -> None:
    _, version = lab.make("bert", "sequence", LORA, bits=4)
    exact = lab.merge(onto="dequantized", out="one")["model"][version.reference]
    other = lab.merge(onto="original", out="two")["model"][version.reference]
    assert other["outputs"]["largest"] > 10 * exact["outputs"]["largest"]
    assert exact["same_choice"] == 1.0
    assert "drawn tokens" in exact["inputs"]


@pytest.mark.full
def test_shards_and_sixteen_bits(lab: Lab) -> None:
    lab.make("bert", "sequence", LORA)
    lab.merge(written={"dtype": "bfloat16", "shard_size": 20_000})
    files = sorted((lab.root / "merged").glob("*.safetensors"))
    names = [name for file in files for name in safe_open(str(file), "pt").keys()]  # noqa: SIM118
    assert len(files) > 1
    assert sorted(set(names)) == sorted(names)
    assert "classifier.weight" in names
    assert all(tensor.dtype == torch.bfloat16 for file in files for tensor in load_file(file).values())
    _, info = loaded(lab.root / "merged", headed_lab.HEADS["sequence"])
    assert_whole(info)


def test_a_head_with_a_lost_or_misshapen_tensor_is_refused(lab: Lab) -> None:
    _, version = lab.make("bert", "sequence", {"method": "bias_only"})
    stored = read(version)
    lost = {name: each for name, each in stored.tensors.items() if name != "classifier.weight"}
    with pytest.raises(DeltaError, match=r"lacks classifier\.weight"):
        deltas_of(replace(stored, tensors=lost), lab.bases["bert"])
    wide = {**stored.tensors, "classifier.weight": torch.zeros(5, 64)}
    with pytest.raises(DeltaError, match=r"\(5, 64\)"):
        deltas_of(replace(stored, tensors=wide), lab.bases["bert"])


def test_heads_are_not_combined(lab: Lab) -> None:
    lab.make("bert", "sequence", LORA, name="one")
    lab.make("bert", "sequence", LORA, name="two", seed=2)
    both = [("one", 0.5), ("two", 0.5)]
    with pytest.raises(DeltaError, match="heads of different adapters cannot be combined: one@"):
        combine_adapters(lab.registry, both, How("svd"), save_as="made", **lab.places)
    for order in (Order(both, onto="original"), Order([("one", 0.5)], onto="original")):
        with pytest.raises(DeltaError, match="heads of different adapters"):
            merge_adapters(lab.registry, order, lab.root / "merged", **lab.places)
    assert not (lab.root / "merged").exists()


@pytest.mark.parametrize("engine", ["peft", "vllm", "gguf", "ollama"])
def test_engines_refuse_a_head(lab: Lab, engine: str) -> None:
    lab.make("llama", "sequence", LORA)
    with pytest.raises(DeltaError, match="has a sequence head") as refused:
        export_for(engine, lab.registry, ["part"], lab.root / "out", lab.places["cache"])
    assert "peftkit merge part" in str(refused.value.hint)
    assert not (lab.root / "out").exists()


def test_what_needs_a_language_head_says_so(lab: Lab) -> None:
    _, version = lab.make("llama", "sequence", LORA)
    with pytest.raises(TuningError, match=r"not for prompts and chat: part@.* \(a sequence head\)") as refused:
        find_base([version], lab.places["cache"])
    assert refused.value.hint == "peftkit predict part FILE"
    with pytest.raises(DeltaError, match="quantize"):
        lab.merge(written={"quantize": "nf4"})
    with pytest.raises(DeltaError, match="no answer tokens"):
        lab.merge(gate=True)


def test_preview_and_diff_name_the_heads_tensors(lab: Lab) -> None:
    _, one = lab.make("bert", "sequence", LORA, name="one")
    _, two = lab.make("bert", "sequence", LORA, name="two", seed=2)
    left, right = (deltas_of(read(version), lab.bases["bert"]) for version in (one, two))
    shown = preview([left], [1.0])
    named = {each.tensor for each in shown.not_shown}
    assert {"classifier.weight", "classifier.bias"} <= named
    apart = compare_deltas(left, right).not_compared
    assert "the heads' own" in apart["classifier.weight"]
    assert "same tensor" in compare_deltas(left, left).not_compared["classifier.weight"]


@pytest.mark.full
def test_an_exported_folder_is_pefts_own_and_comes_back(lab: Lab) -> None:
    from peft import PeftModel

    from peftkit.registry.exchange import export, import_adapter

    backbone, version = lab.make("bert", "sequence", LORA)
    export(lab.registry, "part", lab.root / "out")
    other = Registry(lab.root / "other")
    back = import_adapter(other, lab.root / "out")
    assert back.reference == version.reference
    rows = headed_lab.examples("sequence", (9, 5))
    attached = headed_lab.scores(attach(backbone, version).model, backbone, rows)
    plain = headed_lab.load(lab.bases["bert"], "sequence", seed=7)
    peft = PeftModel.from_pretrained(plain.model, str(lab.root / "out"))
    torch.testing.assert_close(headed_lab.scores(peft, plain, rows), attached, rtol=1e-5, atol=1e-5)
