"""bitsandbytes held to one behaviour: evaluating changes no weight and computes what training computed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbone.bnb import Linear4bit, Linear8bitLt, functional
from peftkit.backbone.contain import base_tensors, contain_bitsandbytes, is_repacked

needs_avx512_bf16 = pytest.mark.skipif(
    not functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16, so bitsandbytes does not re-pack here"
)
IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])


def evaluate(model: Any, folder: Path) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)


def generate(model: Any, folder: Path) -> None:
    model.eval()
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


def state_dict(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), io.BytesIO())


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder / "saved"))


def everything(model: Any, folder: Path) -> None:
    for action in (evaluate, generate, state_dict, save):
        action(model, folder)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base_tensors(model).items()}


def unchanged(before: dict[str, torch.Tensor], model: Any) -> bool:
    after = base_tensors(model)
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize("action", [evaluate, generate, state_dict, save, everything])
@pytest.mark.parametrize("bits", [4, 8])
def test_using_a_base_changes_none_of_its_bytes(
    load: Callable[..., Any], tmp_path: Path, bits: int, action: Callable[[Any, Path], None]
) -> None:
    model = load(bits=bits).model
    evaluate(model, tmp_path)  # int8 layers move their weights into a state at the first forward
    before = snapshot(model)
    assert len(before) > 14
    action(model, tmp_path)
    assert unchanged(before, model)
    assert not is_repacked(model)


@needs_avx512_bf16
@pytest.mark.parametrize("action", [evaluate, generate])
def test_negative_control_without_containment_the_weights_are_repacked(
    load: Callable[..., Any], tmp_path: Path, action: Callable[[Any, Path], None]
) -> None:
    """When this fails, bitsandbytes has stopped re-packing, and `contain_bitsandbytes` can let 4-bit layers be."""
    model = load(bits=4).model
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    before = snapshot(model)
    action(model, tmp_path)
    assert is_repacked(model)
    assert not unchanged(before, model)
    model.state_dict()  # un-packs, and loses double quantization's constants on the way
    assert not is_repacked(model)
    assert not unchanged(before, model)


@needs_avx512_bf16
def test_negative_control_evaluation_then_differs_from_training(load: Callable[..., Any], tmp_path: Path) -> None:
    held, free = load(bits=4).model, load(bits=4).model
    for module in free.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        trained = held.train()(input_ids=IDS).logits
        evaluated = held.eval()(input_ids=IDS).logits
        repacked = free.eval()(input_ids=IDS).logits
    assert torch.equal(trained, evaluated)
    assert float((repacked - trained).norm() / trained.norm()) > 1e-3


def test_containing_counts_the_layers_it_holds(load: Callable[..., Any]) -> None:
    assert contain_bitsandbytes(load(bits=4).model) == {"4-bit": 14, "8-bit": 0}
    assert contain_bitsandbytes(load(bits=8).model) == {"4-bit": 0, "8-bit": 14}
    assert contain_bitsandbytes(load(bits=16).model) == {"4-bit": 0, "8-bit": 0}


def test_int8_layers_stay_on_the_training_path(load: Callable[..., Any]) -> None:
    model = load(bits=8).model
    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    assert len(layers) == 14
    for mode in (False, True, False):
        model.train(mode)
        assert all(layer.training for layer in layers)
        assert model.training == mode
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, model.train()(input_ids=IDS).logits)


def rows_apart(model: Any) -> float:
    """How far a row's logits depend on the rows beside it, relative to their size, at the worst of four rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (4, 24), generator=generator)
    with torch.no_grad():
        together = model(input_ids=ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(together, alone, strict=True))


@pytest.mark.base
def test_an_int8_row_does_not_depend_on_its_neighbours(embedded_int8: Any) -> None:
    assert rows_apart(embedded_int8.model) < 1e-5


@pytest.mark.base
def test_negative_control_plain_int8_evaluation_depends_on_neighbours(embedded_int8: Any) -> None:
    """When this fails, bitsandbytes no longer quantizes activations batch-wide in eval mode."""
    layers = [module for module in embedded_int8.model.modules() if isinstance(module, Linear8bitLt)]
    held = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = Linear8bitLt
            layer.eval()
        assert rows_apart(embedded_int8.model) > 1e-3
    finally:
        for layer, kind in zip(layers, held, strict=True):
            layer.__class__ = kind
            layer.train()
