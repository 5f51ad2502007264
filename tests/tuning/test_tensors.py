"""Kind `tensors`: named tensors stand in for the base's own, over every precision, and the base keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tuning.method_zoo import save_tensors

from peftkit.backbone.contain import base_tensors
from peftkit.errors import TuningError
from peftkit.tuning.attach import Attached

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])
NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
QUERY, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
SHAPES = {NORM: (64,), EMBED: (259, 64), HEAD: (259, 64), QUERY: (64, 64), DOWN: (64, 128)}
CHOICES = [(NORM,), (QUERY,), (QUERY, DOWN, NORM), (EMBED,), (HEAD,), (EMBED, HEAD)]


def values(names: tuple[str, ...], seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(SHAPES[name], generator=generator) for name in names}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_hand(model: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the base computes with these tensors put into it; a tied head follows the embedding unless it is given."""
    tensors = {HEAD: tensors[EMBED], **tensors} if EMBED in tensors else tensors
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        layer, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
        if tuple(layer.weight.shape) != tuple(tensor.shape) or not layer.weight.is_floating_point():
            dense = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            setattr(parent, path.rpartition(".")[2], dense)
            layer = dense
        setattr(layer, key, nn.Parameter(tensor.clone(), requires_grad=False))
    return logits(model)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("names", CHOICES, ids=lambda names: "+".join(name.split(".")[-2] for name in names))
def test_named_tensors_replace_those_of_the_base(
    load: Callable[..., Any], publish: Callable[..., Any], tmp_path: Path, names: tuple[str, ...], bits: int
) -> None:
    host = Attached(load(bits=bits))
    model = host.backbone.model
    base, before = logits(model), {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    with host.using(host.attach(publish("x", save_tensors(tmp_path / "x", values(names)), "tensors"))) as adapted:
        found = logits(adapted)
        assert torch.equal(logits(model), base)
    assert torch.equal(found, by_hand(load(bits=bits).model, values(names)))
    assert not torch.allclose(found, base, atol=1e-3)
    host.detach("x")
    assert torch.equal(logits(model), base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())


def test_a_base_with_a_head_of_its_own(
    load: Callable[..., Any], publish: Callable[..., Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_base(tmp_path / "untied", tie_word_embeddings=False)
    host = Attached(load(folder, bits=32))
    host.activate(host.attach(publish("x", save_tensors(tmp_path / "x", values((EMBED,))), "tensors", folder)))
    assert torch.equal(host.model.model.embed_tokens.weight, values((EMBED,))[EMBED])
    assert host.model.lm_head.weight is host.backbone.model.lm_head.weight


BAD = {
    "unknown name": {"model.layers.9.self_attn.q_proj.weight": torch.zeros(64, 64)},
    "a new head": {"score.weight": torch.zeros(2, 64)},
    "wrong shape": {QUERY: torch.zeros(64, 32)},
    "packed shape": {QUERY: torch.zeros(2048, 1)},
    "integers": {NORM: torch.zeros(64, dtype=torch.int32)},
    "NaN": {NORM: torch.full((64,), float("nan"))},
    "nothing": {},
}


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("bad", sorted(BAD))
def test_what_does_not_fit_is_refused(
    load: Callable[..., Any], publish: Callable[..., Any], tmp_path: Path, bad: str, bits: int
) -> None:
    host = Attached(load(bits=bits))
    base = logits(host.backbone.model)
    with pytest.raises(TuningError):
        host.attach(publish("x", save_tensors(tmp_path / "x", BAD[bad]), "tensors"))
    assert host.versions == {}
    assert torch.equal(logits(host.model), base)
