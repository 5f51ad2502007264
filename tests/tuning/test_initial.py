"""PiSSA, LoftQ and EVA: the published figures of their beginnings, over a base that none of them changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from partial_lab import write_gpt2
from torch import nn
from tuning.test_trained_methods import IDS, examples, logits, spec_of, trained

from peftkit.backbone.quantize import dense_weight, dequantize, quantize
from peftkit.errors import TrainingError, TuningError
from peftkit.tuning.initial import factors, held_weight, leading, lora_layers
from peftkit.tuning.initial_eva import Directions
from peftkit.tuning.inject import inject


def spectrum(power: float, size: int = 256) -> torch.Tensor:
    """A matrix of random directions whose k-th singular value is k^-power; Gaussian for 0, as "flat" is meant."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(size, size, generator=generator)
    if power == 0:
        return gaussian
    u, _, vh = torch.linalg.svd(gaussian)
    return u * torch.arange(1, size + 1).pow(-power) @ vh


# -- the decomposition


@pytest.mark.parametrize("shape", [(40, 60), (600, 560)])
def test_the_leading_part_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    """Eckart and Young: what is left is the tail of the spectrum; large matrices by iteration, within 0.5 %."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        matrix = torch.randn(shape)
        left, right = leading(matrix, 16)
    assert (left.shape, right.shape) == ((shape[0], 16), (16, shape[1]))
    tail = torch.linalg.svdvals(matrix.double())[16:].square().sum().sqrt()
    found = (matrix - left @ right).norm()
    assert float(tail) * (1 - 1e-6) <= float(found) <= float(tail) * (1 + (5e-3 if shape[0] > 512 else 1e-5))


# -- PiSSA (arXiv 2404.02948)


@pytest.mark.parametrize("bits", [4, 32])
def test_pissa_begins_as_the_main_part_and_takes_it_off(load: Callable[..., Any], bits: int) -> None:
    tuned = inject(load(bits=bits), spec_of("pissa"))
    found = lora_layers(tuned.model, "pissa")
    assert len(found) == 14
    for layer in found.values():
        a, b = factors(layer)
        weight, scale = held_weight(layer), layer.scaling["default"]
        assert scale == 32 / 4, "alpha / r of the rank that is trained"
        main = scale * b[:, :4] @ a[:4]
        values = torch.linalg.svdvals(weight.double())
        # ‖W − sB0A0‖² = Σ_{k>r} σ_k², and W_res + sB0A0 = W
        torch.testing.assert_close((weight - main).norm().double(), values[4:].square().sum().sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(scale * b @ a, torch.zeros_like(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_pissa_trains_the_first_half_and_leaves_the_second_bit_for_bit(
    load: Callable[..., Any], tmp_path: Path, optim: str
) -> None:
    tuned = inject(load(bits=4), spec_of("pissa"))
    before = {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}
    trained(tuned, tmp_path, optim=optim)
    for name, parameter in tuned.trainable.items():
        axis = 0 if ".lora_A." in name else 1
        halves = zip(parameter.chunk(2, axis), before[name].chunk(2, axis), strict=True)
        first, second = (torch.equal(now, then) for now, then in halves)
        assert (first, second) == (False, True), name


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"regularize": {"l2": 0.1}}, {"regularize": {"l1": 0.1}}])
def test_pissa_refuses_what_pulls_its_factors_to_zero(
    load: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(TrainingError, match="pulls away from the base") as caught:
        trained(inject(load(bits=32), spec_of("pissa")), tmp_path, **settings)
    assert "train.regularize.l2_sp=0.1" in str(caught.value)


@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_a_rank_above_the_width_is_refused(load: Callable[..., Any], method: str) -> None:
    backbone = load(bits=32)
    with pytest.raises(TuningError, match=r"adapter\.r=65"):
        inject(backbone, spec_of(method, r=65), rows=examples())
    assert inject(backbone, spec_of("lora")).names, "nothing was left behind"


@pytest.mark.parametrize("bits", [4, 32])
def test_layers_of_gpt2_are_transposed(load: Callable[..., Any], tmp_path: Path, bits: int) -> None:
    """Conv1D holds (in, out); the files do too, also where bitsandbytes holds (out, in)."""
    backbone = load(write_gpt2(tmp_path / "gpt2"), bits=bits)
    base = logits(backbone.model)
    tuned = inject(backbone, spec_of("pissa" if bits == 32 else "loftq", r=16))
    if bits == 32:
        assert float((logits(tuned.model) - base).norm() / base.norm()) < 1e-5
        return
    original = logits(load(tmp_path / "gpt2", bits=32).model)
    assert float((logits(tuned.model) - original).norm()) < 0.9 * float((base - original).norm())


# -- LoftQ (arXiv 2310.08659)


@pytest.mark.parametrize(("power", "ratio"), [(0.0, 0.888), (0.5, 0.880), (1.0, 0.816)])
def test_loftq_leaves_the_published_share_of_the_error(power: float, ratio: float) -> None:
    """r 16, 256², NF4 in blocks of 64, one round: ‖W − Q − AB‖ / ‖W − Q‖ (docs of the method's oracles, ± 2 %)."""
    weight = spectrum(power)
    lost = weight - dequantize(quantize(weight, double_quant=False))
    left, right = leading(lost, 16)
    assert float((lost - left @ right).norm() / lost.norm()) == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_begins_with_what_quantization_took(load: Callable[..., Any], bits: int) -> None:
    original = load(bits=32).model
    backbone = load(bits=bits)
    quantized = logits(backbone.model)
    events: list[Any] = []
    tuned = inject(backbone, spec_of("loftq", r=16), report=events.append)
    assert any("quantization error" in str(event) for event in events)
    for name, layer in lora_layers(tuned.model, "loftq").items():
        a, b = factors(layer)
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
        lost = weight - held_weight(layer)
        values = torch.linalg.svdvals(lost.double())
        after = (lost - layer.scaling["default"] * b @ a).norm().double()
        torch.testing.assert_close(after, values[16:].square().sum().sqrt(), rtol=1e-4, atol=1e-7)
    exact = logits(original)
    assert float((logits(tuned.model) - exact).norm()) < 0.8 * float((quantized - exact).norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_of_a_layer_that_is_not_quantized_begins_as_lora(load: Callable[..., Any], bits: int) -> None:
    """With zeros for both factors, neither would ever get a gradient."""
    events: list[Any] = []
    backbone = load(bits=bits)
    tuned = inject(backbone, spec_of("loftq", target_modules=["q_proj", "lm_head"]), report=events.append)
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in lora_layers(tuned.model, "loftq").items():
        a, b = factors(layer)
        assert a.any(), name
        assert bool(b.any()) == name.endswith("q_proj"), name
        assert b.grad.any(), name
    assert any("1 layers that are not quantized begin as LoRA's do" in str(event) for event in events)


def test_loftq_where_nothing_is_quantized_is_refused(load: Callable[..., Any]) -> None:
    backbone = load(bits=4)
    with pytest.raises(TuningError, match="none of the 1 adapted layers is quantized: lm_head"):
        inject(backbone, spec_of("loftq", target_modules=["lm_head"]))
    assert inject(backbone, spec_of("lora")).names, "nothing was left behind"


@pytest.mark.full
@pytest.mark.base
def test_loftq_brings_the_embedded_base_nearer_to_its_16_bits(embedded: Path, cache: Path) -> None:
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec

    exact = logits(load_backbone(BaseSpec(), QuantSpec(bits=32), cache).model)
    backbone = load_backbone(BaseSpec(), QuantSpec(bits=4, compute_dtype="float32"), cache)
    quantized = logits(backbone.model)
    weights = {
        name: dense_weight(module) for name, module in backbone.model.named_modules() if "down_proj" in name[-9:]
    }
    events: list[Any] = []
    tuned = inject(backbone, spec_of("loftq", r=16), report=events.append)
    assert len(weights) == 30
    (note,) = [str(event) for event in events if "quantization error" in str(event)]
    share = float(note.split("error ")[1].split("%")[0])
    assert 70 < share < 99
    assert float((logits(tuned.model) - exact).norm()) < float((quantized - exact).norm())


# -- EVA (arXiv 2410.07170)


def captured(inputs: torch.Tensor, rows: torch.Tensor) -> float:
    """The share of the inputs' energy in the span of orthonormal rows."""
    return float((inputs @ rows.double().T).square().sum() / inputs.square().sum())


def test_directions_of_pieces_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    # A spectrum like that of activations: a few directions hold most of the energy.
    inputs = torch.randn(1500, 96, generator=generator, dtype=torch.float64) * torch.arange(1, 97).pow(-1.0)
    found = Directions(32)
    for piece in inputs.split(170):
        found.add(piece)
    rows = found.leading(8)
    assert rows is not None
    torch.testing.assert_close(rows @ rows.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-10)
    best = torch.linalg.svdvals(inputs).square()
    assert captured(inputs, rows) == pytest.approx(float(best[:8].sum() / best.sum()), rel=1e-4)
    assert Directions(32).leading(8) is None


@pytest.mark.parametrize("bits", [4, 32])
def test_eva_begins_with_the_leading_directions_of_the_inputs(load: Callable[..., Any], bits: int) -> None:
    backbone = load(bits=bits)
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, given, name=name: inputs.setdefault(name, []).append(given[0].flatten(0, -2).double())
        )
        for name, module in backbone.model.named_modules()
        if name.endswith("_proj")
    ]
    for row in examples():
        logits(backbone.model, torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    tuned = inject(backbone, spec_of("eva", r=8), rows=examples())
    generator = torch.Generator().manual_seed(0)
    layers = lora_layers(tuned.model, "eva")
    assert len(layers) == len(inputs) == 14
    for name, layer in layers.items():
        a, b = factors(layer)
        seen = torch.cat(inputs[name.removeprefix("base_model.model.")])
        assert not b.any()
        torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-5)
        best = torch.linalg.svdvals(seen).square()
        assert captured(seen, a) == pytest.approx(float(best[:8].sum() / best.sum()), rel=1e-3)
        for _ in range(5):
            random = torch.linalg.qr(torch.randn(seen.shape[1], 8, generator=generator, dtype=torch.float64))[0].T
            assert captured(seen, a) > captured(seen, random)


def test_eva_needs_rows(load: Callable[..., Any]) -> None:
    backbone = load(bits=4)
    with pytest.raises(TuningError, match="0 tokens for r=4"):
        inject(backbone, spec_of("eva"))
    with pytest.raises(TuningError, match="7 tokens for r=16"):
        inject(backbone, spec_of("eva", r=16), rows=examples((7,)))
    assert not any(isinstance(module, nn.ModuleDict) for module in backbone.model.modules()), "nothing was left behind"
    assert torch.equal(logits(inject(backbone, spec_of("eva"), rows=examples()).model, IDS), logits(backbone.model))
