"""Four bits per weight: the codebook as published, the error as derived, and what a weight costs in memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from peftkit.backbone.bnb import functional as bnb
from peftkit.backbone.quantize import BLOCK, dense_weight, dequantize, footprint, quantize
from peftkit.errors import BackboneError

# QLoRA, arXiv 2305.14314, appendix E; bitsandbytes' own table differs from it by at most 1.1e-7.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = sorted({sign * value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3) for sign in (-1, 1)})
WRONG_WIDTHS = (16, 32, 48, 80, 96)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def reference(packed: torch.Tensor, state: Any, codebook: list[float]) -> torch.Tensor:
    """Dequantization written down from the format: two codes per byte, high half first, one scale per 64 weights."""
    flat = packed.flatten().to(torch.long)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[: state.shape.numel()]
    scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (torch.tensor(codebook)[codes] * scales).view(state.shape)


def test_codebook_is_the_published_one() -> None:
    weight = torch.tensor(NF4).repeat(8, 8)  # every block of 64 holds every level, and 1 as its maximum
    levels = dequantize(quantize(weight, "nf4", double_quant=False)).unique()
    torch.testing.assert_close(levels, torch.tensor(NF4), rtol=0, atol=1.1e-7)
    assert (levels < 0).sum() == 7
    assert (levels == 0).sum() == 1
    assert (levels > 0).sum() == 8


def test_fp4_codebook() -> None:
    weight = torch.tensor([*FP4, 0.0]).repeat(8, 16)[:, :BLOCK]
    levels = dequantize(quantize(weight, "fp4", double_quant=False)).unique()
    # bitsandbytes keeps .0052 for .0625/12 = .00520833: five digits.
    torch.testing.assert_close(levels, torch.tensor(FP4), rtol=0, atol=1e-5)


def test_unpacking_by_the_format_gives_the_same_numbers() -> None:
    quantized = quantize(gaussian(128, 192), "nf4", double_quant=False)
    torch.testing.assert_close(
        dequantize(quantized), reference(quantized.packed, quantized.state, NF4), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_idempotent_without_double_quantization(quant_type: str) -> None:
    first = quantize(gaussian(512, 512), quant_type, double_quant=False)
    again = quantize(dequantize(first), quant_type, double_quant=False)
    if quant_type == "nf4":  # fp4 has two zeros, so its bytes may differ where its numbers do not
        assert torch.equal(first.packed, again.packed)
    assert torch.equal(first.state.absmax, again.state.absmax)
    assert torch.equal(dequantize(first), dequantize(again))


@pytest.mark.parametrize(("quant_type", "expected"), [("nf4", 0.00846), ("fp4", 0.01489)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_error_on_gaussian_weights(quant_type: str, expected: float, double_quant: bool) -> None:
    weight = gaussian(1024, 1024)
    difference = dequantize(quantize(weight, quant_type, double_quant)) - weight
    assert float(difference.pow(2).mean() / weight.pow(2).mean()) == pytest.approx(expected, rel=0.03)


def test_every_weight_goes_to_its_nearest_level() -> None:
    weight = gaussian(64, 256)
    quantized = quantize(weight, "nf4", double_quant=False)
    scales = quantized.state.absmax.repeat_interleave(BLOCK).view_as(weight)
    widest = max(high - low for low, high in pairwise(NF4))
    assert widest == pytest.approx(0.3038, abs=1e-4)
    assert bool(((dequantize(quantized) - weight).abs() <= scales * widest / 2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("columns", WRONG_WIDTHS)
def test_refuses_widths_that_upstream_gets_wrong_on_a_cpu(columns: int) -> None:
    with pytest.raises(BackboneError, match=f"{columns} columns"):
        dequantize(quantize(gaussian(64, columns), double_quant=False))


@pytest.mark.parametrize("columns", WRONG_WIDTHS)
def test_contract_upstream_is_still_wrong_for_these_widths(columns: int) -> None:
    """When this fails, bitsandbytes has mended `dequantize_4bit` on CPUs, and the refusal above can go."""
    packed, state = bnb.quantize_4bit(gaussian(64, columns), blocksize=BLOCK, quant_type="nf4")
    expected = reference(packed, state, NF4)
    assert float((bnb.dequantize_4bit(packed, state) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("columns", [64, 192, 576])
def test_upstream_is_right_for_multiples_of_64(columns: int) -> None:
    packed, state = bnb.quantize_4bit(gaussian(64, columns), blocksize=BLOCK, quant_type="nf4")
    torch.testing.assert_close(bnb.dequantize_4bit(packed, state), reference(packed, state, NF4), rtol=1e-6, atol=1e-6)


def test_only_matrices() -> None:
    with pytest.raises(BackboneError, match="matrix"):
        quantize(torch.zeros(64))


@pytest.mark.base
def test_bits_per_parameter_of_the_embedded_base(embedded_nf4: Any) -> None:
    measured = footprint(embedded_nf4.model)
    assert measured.linear_parameters == 106_168_320  # methods-and-oracles §2.2
    assert measured.bits_per_linear_parameter == pytest.approx(4.127, abs=0.001)
    # Embeddings and norms stay in the 16 bits that were asked for: PEFT's k-bit preparation would double them.
    assert measured.linear_parameters + measured.other_parameters == 134_515_008
    assert measured.other_bytes == 2 * measured.other_parameters
    assert measured.linear_bytes + measured.other_bytes == pytest.approx(111.5e6, rel=0.001)


@pytest.mark.parametrize(
    ("quant", "bits"),
    # 4 bits and one float32 per 64; with double quantization one byte per 64 and a float32 per 256 of those.
    [({"bits": 4, "double_quant": False}, 4.5), ({"bits": 8}, 8)],
)
def test_bits_per_parameter(load: Callable[..., Any], quant: dict[str, Any], bits: float) -> None:
    measured = footprint(load(**quant).model)
    # hidden 64, key and value 32, MLP 128, two layers
    assert measured.linear_parameters == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    if quant["bits"] == 8:  # and one float32 per output row
        rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
        bits += 32 * rows / measured.linear_parameters
    assert measured.bits_per_linear_parameter == pytest.approx(bits, rel=1e-12)


def test_no_quantized_layers_no_bits(load: Callable[..., Any]) -> None:
    assert footprint(load(bits=16).model).bits_per_linear_parameter == 0.0


@pytest.mark.parametrize("quant", [{"bits": 4}, {"bits": 4, "quant_type": "fp4", "double_quant": False}, {"bits": 8}])
def test_dense_weight_is_what_the_layer_multiplies_with(load: Callable[..., Any], quant: dict[str, Any]) -> None:
    from peftkit.backbone.contain import quantized_linears

    model = load(**quant).model
    before = {name: dense_weight(layer) for name, layer in quantized_linears(model).items()}
    assert len(before) == 14
    for name, layer in quantized_linears(model).items():
        x = gaussian(5, layer.in_features, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ before[name].T, rtol=1e-4, atol=1e-5)
        assert torch.equal(dense_weight(layer), before[name]), "the first forward moves int8 weights, not their value"
