"""What partial fine-tuning learned is attached, swapped, continued and handed on like any other adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import partial_lab
import pytest
import torch
from partial_lab import logits, moved, write_bases
from tuning.method_zoo import save_tensors

from peftkit.backbone.contain import base_tensors
from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import TuningError
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.tuning.attach import attach, open_adapters, resume_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import dense_layers

EMBED = "model.embed_tokens.weight"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {"method": "full"}),
    "top layer and tied head": ("llama", {"method": "top_layers", "top_layers": 1}),
    "head alone": ("untied", {"method": "top_layers", "top_layers": 0}),
    "biases": ("gpt2", {"method": "bias_only"}),
    "norms": ("gemma2", {"method": "norms"}),
    "a layer of GPT-2": ("gpt2", {"method": "patterns", "patterns": ["transformer.h.1.*.c_*"]}),
    "a tied embedding": ("llama", {"method": "patterns", "patterns": [EMBED]}),
}
DEFAULT = {("full", 32), ("top layer and tied head", 8), *((name, 4) for name in METHODS)}
RUNS = [
    pytest.param(name, bits, marks=() if (name, bits) in DEFAULT else pytest.mark.full)
    for name in METHODS
    for bits in (32, 16, 8, 4)
    if name != "full" or bits > 8
]
Make = Callable[..., tuple[Any, Version]]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def make(bases: dict[str, Path], registry: Registry, tmp_path: Path) -> Make:
    """A partial fine-tune that has moved, and its published version."""

    def make(method: str, bits: int = 32, name: str = "part", *, seed: int = 1, **load: Any) -> tuple[Any, Version]:
        base, settings = METHODS[method]
        tuned = moved(partial_lab.tune(bases[base], tmp_path / "cache", bits, **load, **settings), seed)
        payload = tmp_path / "payloads" / name
        return tuned, partial_lab.publish(registry, name, tuned, payload, tmp_path / "cache")

    return make


@pytest.mark.parametrize(("method", "bits"), RUNS)
def test_attached_it_computes_what_it_computed_in_training(make: Make, tmp_path: Path, method: str, bits: int) -> None:
    """Bitwise: over 4 and 8 bits the trained layers were unquantized in training, and are again."""
    tuned, version = make(method, bits)
    host = open_adapters([version], tmp_path / "cache")
    assert host.backbone.quant.bits == bits
    assert torch.equal(logits(host.model), logits(tuned.model))
    assert not torch.allclose(logits(host.model), logits(host.backbone.model), atol=1e-3)


def test_a_bfloat16_base_rounds_what_was_learned_once(make: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    tuned, version = make("top layer and tied head", 16, dtype="bfloat16")
    quant = QuantSpec(bits=16, dtype="bfloat16", device="cpu")
    host = attach(load_backbone(BaseSpec(source=str(bases["llama"])), quant, tmp_path / "cache"), version)
    held = dict(host.model.named_parameters())
    for name, value in tuned.trainable.items():
        assert torch.equal(held[name], value.to(torch.bfloat16)), name
        assert not torch.equal(held[name].float(), value)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.full)])
def test_swaps_beside_a_lora_are_bitwise(make: Make, bases: dict[str, Path], tmp_path: Path, bits: int) -> None:
    registry = Registry(tmp_path / "registry")
    _, top = make("top layer and tied head", bits, "top")
    _, whole = make("a tied embedding", bits, "whole", seed=2)
    lora = moved(partial_lab.tune(bases["llama"], tmp_path / "cache", bits, method="lora", r=4), size=0.1)
    beside = partial_lab.publish(registry, "beside", lora, tmp_path / "payloads" / "beside", tmp_path / "cache")
    host = open_adapters([top, beside, whole], tmp_path / "cache")
    before = {name: tensor.clone() for name, tensor in base_tensors(host.backbone.model).items()}
    found: dict[str | None, torch.Tensor] = {}
    for name in (None, "top", "beside", "top", "whole", None, "beside", "whole", None):
        with host.using(name) as model:
            assert torch.equal(found.setdefault(name, logits(model)), logits(model)), name
    assert len({tuple(value.flatten().tolist()) for value in found.values()}) == 4
    after = base_tensors(host.backbone.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def backbone_of(folder: Path, cache: Path, bits: int, spec: AdapterSpec) -> Any:
    quant = QuantSpec.model_validate({"bits": bits, "device": "cpu"})
    return load_backbone(BaseSpec(source=str(folder)), quant, cache, dense=dense_layers(spec))


@pytest.mark.parametrize("bits", [4, pytest.param(32, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", ["top layer and tied head", "biases", "a layer of GPT-2"])
def test_continuing_begins_where_it_ended(
    make: Make, bases: dict[str, Path], tmp_path: Path, method: str, bits: int
) -> None:
    tuned, version = make(method, bits)
    spec = AdapterSpec(**METHODS[method][1])
    again = resume_adapter(
        backbone_of(bases[METHODS[method][0]], tmp_path / "cache", bits, spec), version, AdapterSpec(), asked=[]
    )
    assert again.names == tuned.names
    assert again.spec == tuned.spec
    assert again.parents == ({"name": "part", "version": version.id, "relation": "continued"},)
    assert all(torch.equal(value, tuned.trainable[name]) for name, value in again.trainable.items())
    assert all(value.requires_grad and value.dtype == torch.float32 for value in again.trainable.values())
    assert torch.equal(logits(again.model), logits(tuned.model))


@pytest.mark.parametrize("asked", [{"method": "lora"}, {"method": "norms"}, {"method": "top_layers", "top_layers": 2}])
def test_continuing_as_something_else_is_refused(make: Make, tmp_path: Path, asked: dict[str, Any]) -> None:
    tuned, version = make("top layer and tied head")
    with pytest.raises(TuningError, match="but the settings ask for"):
        resume_adapter(tuned.backbone, version, AdapterSpec(**asked), asked=list(asked))


def test_a_version_that_does_not_say_how_it_was_trained_continues_by_names(
    publish: Callable[..., Version], bases: dict[str, Path], tmp_path: Path
) -> None:
    """An imported one: its method is `patterns`, and its own names are the patterns."""
    names = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    shapes = {names[0]: (64, 128), names[1]: (64,)}
    tensors = {name: 0.1 * torch.randn(shapes[name], generator=torch.Generator().manual_seed(1)) for name in names}
    version = publish("x", save_tensors(tmp_path / "x", tensors), "tensors", bases["llama"])
    backbone = backbone_of(bases["llama"], tmp_path / "cache", 4, AdapterSpec())
    again = resume_adapter(backbone, version, AdapterSpec(), asked=[])
    assert again.spec == AdapterSpec(method="patterns", patterns=names)
    assert {name: value.tolist() for name, value in again.trainable.items()} == {
        name: value.tolist() for name, value in tensors.items()
    }
    with pytest.raises(TuningError, match=r"adapter\.method=lora"):
        resume_adapter(backbone, version, AdapterSpec(method="lora"), asked=["method"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": ["x"]}, None),  # what it was trained as is not known: it goes on as its own tensors
        ({"method": "norms", "r": 4}, "norms has no r"),
        ({"method": "norms", "layers": 3}, "adapter.layers: Input should be a valid string"),
    ],
)
def test_a_manifest_that_says_what_no_method_has(
    registry: Registry, bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any], says: str | None
) -> None:
    backbone = backbone_of(bases["llama"], tmp_path / "cache", 32, AdapterSpec(method="norms"))
    payload = save_tensors(tmp_path / "payload", {"model.norm.weight": torch.full((64,), 2.0)})
    fields = {"kind": "tensors", "base": base_fields(backbone), "adapter": settings}
    version = registry.publish("odd", payload, Draft.model_validate(fields), base=backbone.identity.record)
    if says is None:
        assert resume_adapter(backbone, version, AdapterSpec(), asked=()).names == ("model.norm.weight",)
        return
    with pytest.raises(TuningError, match=says) as caught:
        resume_adapter(backbone, version, AdapterSpec(), asked=())
    assert version.reference in str(caught.value)


def test_a_stored_buffer_is_attached_and_not_continued(
    registry: Registry, bases: dict[str, Path], tmp_path: Path
) -> None:
    backbone = backbone_of(bases["llama"], tmp_path / "cache", 32, AdapterSpec(method="norms"))
    backbone.model.register_buffer("calibration", torch.ones(2))
    payload = save_tensors(tmp_path / "payload", {"calibration": torch.full((2,), 3.0)})
    fields = {"kind": "tensors", "base": base_fields(backbone), "adapter": {}}
    version = registry.publish("odd", payload, Draft.model_validate(fields), base=backbone.identity.record)
    assert attach(backbone, version).model.calibration.tolist() == [3, 3]
    with pytest.raises(TuningError, match="calibration is a buffer of the base"):
        resume_adapter(backbone, version, AdapterSpec(), asked=())
