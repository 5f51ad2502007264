"""What partial fine-tuning learned is merged, combined, extracted and exported like any other adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import partial_lab
import pytest
import torch
from partial_lab import logits, moved, write_bases
from safetensors.torch import load_file

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.deltas.combining.methods import How
from peftkit.errors import DeltaError
from peftkit.events import Warned
from peftkit.registry.store import Registry, Version
from peftkit.release.combine import combine_adapters
from peftkit.release.export.entry import ExportOptions, export_for
from peftkit.release.merge import Order, merge_adapters, plan_adapters
from peftkit.tuning.attach import open_adapters

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {"method": "full"}),
    "top": ("llama", {"method": "top_layers", "top_layers": 1}),
    "head": ("untied", {"method": "top_layers", "top_layers": 0}),
    "biases": ("gpt2", {"method": "bias_only"}),
    "norms": ("gemma2", {"method": "norms"}),
    "conv1d": ("gpt2", {"method": "patterns", "patterns": ["transformer.h.1.*.c_*"]}),
    "embedding": ("llama", {"method": "patterns", "patterns": [EMBED]}),
    "matrices": ("llama", {"method": "patterns", "patterns": ["model.layers.*_proj.weight"]}),
}
HEAVY = pytest.mark.full


class Lab:
    """A registry, and partial fine-tunes that are made in it."""

    def __init__(self, root: Path, bases: dict[str, Path]) -> None:
        self.root, self.bases, self.cache = root, bases, root / "cache"
        self.registry = Registry(root / "registry")
        self.places = {"cache": self.cache, "runs": root / "runs"}

    def make(self, method: str, bits: int = 32, name: str = "part", *, seed: int = 1) -> tuple[Any, Version]:
        base, settings = METHODS[method]
        return self._made(base, bits, name, seed, settings)

    def lora(self, bits: int = 32, name: str = "beside") -> tuple[Any, Version]:
        return self._made("llama", bits, name, 3, {"method": "lora", "r": 4})

    def _made(self, base: str, bits: int, name: str, seed: int, settings: dict[str, Any]) -> tuple[Any, Version]:
        tuned = moved(partial_lab.tune(self.bases[base], self.cache, bits, **settings), seed)
        return tuned, partial_lab.publish(self.registry, name, tuned, self.root / "payloads" / name, self.cache)

    def merge(self, *names: str, out: str = "merged", dtype: str = "float32", **order: Any) -> tuple[Any, Any]:
        """(logits of the merged model, the receipt)."""
        wanted = Order([(name, 1.0) for name in names], written={"dtype": dtype}, **order)
        receipt = merge_adapters(self.registry, wanted, self.root / out, **self.places)
        return logits(self.load(self.root / out)), receipt.as_record()

    def load(self, folder: Path) -> Any:
        quant = QuantSpec(bits=32, device="cpu")
        return load_backbone(BaseSpec(source=str(folder)), quant, self.cache).model

    def combine(self, *names: str, **options: Any) -> Any:
        weighted = [(name, 1.0) for name in names]
        return combine_adapters(self.registry, weighted, How("svd"), save_as="made", **self.places, **options)

    def dense(self, base: str, name: str) -> torch.Tensor:
        return load_file(self.bases[base] / "model.safetensors")[name].double()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def lab(tmp_path: Path, bases: dict[str, Path]) -> Lab:
    return Lab(tmp_path, bases)


DEFAULT = ("top", "norms", "conv1d", "embedding")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in DEFAULT else HEAVY) for name in sorted(METHODS)]
)
def test_merged_it_computes_what_it_computed_in_training(lab: Lab, method: str) -> None:
    """Bitwise in float32: a tensor that stands in for the base's is written as it is."""
    tuned, _ = lab.make(method)
    plan, _ = plan_adapters(lab.registry, Order([("part", 1.0)]), lab.root / "merged", cache=lab.cache)
    assert len(plan.changed) == len(tuned.names)
    found, receipt = lab.merge("part")
    assert torch.equal(found, logits(tuned.model))
    assert receipt["weights"]["kept"] == 1
    assert receipt["weights"]["entries"] == tuned.trainable_parameters
    moved_by = math.sqrt(sum(float((0.05 * _drawn(tuned)[name]).square().sum()) for name in tuned.names))
    assert receipt["weights"]["delta_norm"] == pytest.approx(moved_by, rel=1e-4)


def _drawn(tuned: Any) -> dict[str, torch.Tensor]:
    """What `moved` has added, in units of its size."""
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(value.shape, generator=draw).double() for name, value in tuned.trainable.items()}


@pytest.mark.parametrize("method", ["top", *(pytest.param(name, marks=HEAVY) for name in ("norms", "conv1d"))])
def test_over_4_bits_dequantized_is_what_training_saw_and_original_has_the_numbers_it_began_from(
    lab: Lab, method: str
) -> None:
    tuned, _ = lab.make(method, 4)
    with pytest.raises(DeltaError, match="--onto does not say which weights are meant"):
        lab.merge("part")
    seen, _ = lab.merge("part", onto="dequantized", out="dequantized")
    assert torch.equal(seen, logits(tuned.model))
    _, receipt = lab.merge("part", onto="original", out="original")
    drawn = _drawn(tuned)
    moved_by = math.sqrt(sum(float((0.05 * drawn[name]).square().sum()) for name in tuned.names))
    assert receipt["weights"]["delta_norm"] == pytest.approx(moved_by, rel=1e-4)
    over = open_adapters([lab.registry.resolve("part")], lab.cache, bits=32)
    assert torch.equal(logits(lab.load(lab.root / "original")), logits(over.model))


def test_merged_into_bfloat16_it_is_rounded_once(lab: Lab) -> None:
    tuned, _ = lab.make("top")
    lab.merge("part", dtype="bfloat16")
    written = load_file(lab.root / "merged" / "model.safetensors")
    for name, value in tuned.trainable.items():
        assert torch.equal(written[name], value.detach().to(torch.bfloat16)), name
    assert not torch.equal(written["lm_head.weight"], written[EMBED])


def test_sums_of_two_and_with_a_lora(lab: Lab) -> None:
    """W + ΔW₁ + ΔW₂, where ΔW of a tensor that stands in for the base's is that minus the base's."""
    one, _ = lab.make("top", name="one")
    two, _ = lab.make("matrices", name="two", seed=2)
    lora, _ = lab.lora()
    lab.merge("one", "two", "beside")
    written = load_file(lab.root / "merged" / "model.safetensors")
    inside = dict(lora.model.named_modules())
    for layer in (0, 1):
        path = f"model.layers.{layer}.self_attn.q_proj"
        module = inside[f"base_model.model.{path}"]
        low = module.lora_B["default"].weight.detach().double() @ module.lora_A["default"].weight.detach().double()
        expected = lab.dense("llama", f"{path}.weight") + module.scaling["default"] * low
        for tuned in (one, two):
            if f"{path}.weight" in tuned.trainable:
                value = tuned.trainable[f"{path}.weight"].detach().double()
                expected += value - lab.dense("llama", f"{path}.weight")
        torch.testing.assert_close(written[f"{path}.weight"].double(), expected, rtol=0, atol=1e-7)
    norm = written["model.layers.1.input_layernorm.weight"]
    assert torch.equal(norm, one.trainable["model.layers.1.input_layernorm.weight"])


@pytest.mark.parametrize("method", ["matrices", "conv1d", "embedding"])
def test_extracted_as_a_lora_the_error_is_what_the_singular_values_say(lab: Lab, method: str) -> None:
    """Eckart and Young: error² = Σ σ_k² for k beyond the rank, here by numpy on the dense ΔW."""
    tuned, _ = lab.make(method)
    base = METHODS[method][0]
    outcome = lab.combine("part", rank=24, max_residual=1)
    measured = {each.name: each for each in outcome.combined.tensors}
    assert measured.keys() == set(tuned.names)
    lost = whole = 0.0
    for name, value in tuned.trainable.items():
        delta = (value.detach().double() - lab.dense(base, name)).numpy()
        left = 0.0
        if delta.ndim == 2:
            left = math.sqrt(float((np.linalg.svd(delta, compute_uv=False)[24:] ** 2).sum()))
        assert measured[name].error == pytest.approx(left, rel=1e-9, abs=1e-12)
        assert measured[name].norm == pytest.approx(float(np.linalg.norm(delta)), rel=1e-12)
        lost, whole = lost + left**2, whole + float((delta**2).sum())
    (receipt,) = outcome.version.manifest.receipts
    assert receipt["residual"] == pytest.approx(math.sqrt(lost / whole), rel=1e-9)
    assert {each["name"]: each["residual"] for each in receipt["tensors"]} == {
        name: each.residual for name, each in measured.items()
    }
    with pytest.raises(DeltaError, match="at rank 24 the result of svd is off by"):
        lab.combine("part", rank=24)


@pytest.mark.parametrize("method", ["matrices", pytest.param("conv1d", marks=HEAVY), "embedding"])
def test_a_lora_of_full_rank_computes_the_same(lab: Lab, method: str) -> None:
    tuned, _ = lab.make(method)
    made = lab.combine("part", rank=64).version
    assert made.manifest.kind == "peft"
    host = open_adapters([made], lab.cache)
    torch.testing.assert_close(logits(host.model), logits(tuned.model), rtol=1e-5, atol=1e-5)


def test_what_no_lora_can_hold_is_refused_with_its_share_or_left_out_knowingly(lab: Lab) -> None:
    tuned, _ = lab.make("top")
    drawn = _drawn(tuned)
    squares = {name: float(drawn[name].square().sum()) for name in tuned.names}
    vectors = {name for name in tuned.names if tuned.trainable[name].dim() == 1}
    share = sum(squares[name] for name in vectors) / sum(squares.values())
    with pytest.raises(DeltaError) as caught:
        lab.combine("part", rank=64)
    assert f"{share:.2g} of ‖ΔW‖²" in str(caught.value)
    assert all(name in str(caught.value) for name in vectors)
    assert "--drop" in str(caught.value)
    with pytest.raises(DeltaError, match="what is left out is more than that"):
        lab.combine("part", rank=64, drop=True)
    outcome = lab.combine("part", rank=64, drop=True, max_residual=0.1)
    assert outcome.combined.residual == pytest.approx(math.sqrt(share), rel=1e-4)
    (receipt,) = outcome.version.manifest.receipts
    assert {each["name"] for each in receipt["tensors"] if each["kind"] == "left out"} == vectors
    with torch.no_grad():
        for name in vectors:
            tuned.trainable[name].copy_(dict(tuned.backbone.model.named_parameters())[name])
    host = open_adapters([outcome.version], lab.cache)
    torch.testing.assert_close(logits(host.model), logits(tuned.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["norms", "biases"])
def test_where_nothing_would_be_left_dropping_is_no_way(lab: Lab, method: str) -> None:
    lab.make(method)
    with pytest.raises(DeltaError, match="no LoRA adapter can hold a saved tensor of part@") as caught:
        lab.combine("part", rank=8, drop=True)
    assert "--drop" not in str(caught.value)


def test_over_packed_weights_the_extracted_lora_is_announced_as_another_thing(lab: Lab) -> None:
    tuned, _ = lab.make("matrices", 4)
    events: list[Any] = []
    made = lab.combine("part", rank=64, report=events.append).version
    assert any(isinstance(event, Warned) and "trained unquantized" in event.text for event in events)
    whole = open_adapters([made], lab.cache, bits=32)
    torch.testing.assert_close(logits(whole.model), logits(tuned.model), rtol=1e-5, atol=1e-5)
    packed = open_adapters([made], lab.cache)
    assert not torch.allclose(logits(packed.model), logits(tuned.model), atol=1e-3)


@pytest.mark.parametrize("engine", ["peft", "vllm", "gguf", "ollama"])
def test_engines_refuse_it_by_name_with_what_works_instead(lab: Lab, engine: str) -> None:
    lab.make("matrices")
    with pytest.raises(DeltaError, match="kind tensors") as caught:
        export_for(engine, lab.registry, ["part"], lab.root / "out", lab.cache)
    assert "peftkit merge part --onto original --out FOLDER" in str(caught.value)
    assert "peftkit combine part --method svd --rank R --drop --save-as part-lora" in str(caught.value)
    assert not (lab.root / "out").exists()


@pytest.mark.parametrize("method", ["norms", "biases"])
def test_engines_offer_no_lora_of_what_no_lora_holds(lab: Lab, method: str) -> None:
    lab.make(method)
    with pytest.raises(DeltaError, match="kind tensors") as caught:
        export_for("vllm", lab.registry, ["part"], lab.root / "out", lab.cache)
    assert "peftkit merge part --onto original --out FOLDER" in str(caught.value)
    assert "combine" not in str(caught.value)
    with pytest.raises(DeltaError, match="no LoRA adapter can hold"):
        lab.combine("part", rank=8, drop=True)


@pytest.mark.parametrize("engine", ["gguf", pytest.param("ollama", marks=HEAVY)])
def test_merged_it_leaves_as_gguf(lab: Lab, engine: str) -> None:
    lab.make("norms")
    options = ExportOptions(merged=True, dtype="float32")
    receipt = export_for(engine, lab.registry, ["part"], lab.root / "out", lab.cache, options=options)
    assert "model.gguf" in receipt.files
    assert receipt.versions["part"]["written"]["weights"]["kept"] == 1
