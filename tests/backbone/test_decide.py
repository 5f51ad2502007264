"""Where and how a backbone computes on machines that this one is not: pure decisions, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from peftkit.backbone import decide
from peftkit.backbone.decide import optimizer, place
from peftkit.backbone.spec import QuantSpec
from peftkit.errors import BackboneError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a GPU of this compute capability, with or without flash_attn."""

    def pretend(capability: tuple[int, int] | None, flash_attn: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(decide, "is_flash_attn_2_available", lambda: flash_attn)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))

    return pretend


def test_a_cpu_computes_in_float32(gpu: Callable[..., None]) -> None:
    gpu(None)
    chosen = place(QuantSpec())
    assert (chosen.device.type, chosen.compute_dtype, chosen.dtype) == ("cpu", torch.float32, torch.float32)
    assert chosen.attention == "sdpa"


def test_ampere_and_later_compute_in_bfloat16(gpu: Callable[..., None]) -> None:
    gpu((8, 9))
    chosen = place(QuantSpec())
    assert (chosen.device, chosen.compute_dtype, chosen.dtype) == (
        torch.device("cuda", 0),
        torch.bfloat16,
        torch.bfloat16,
    )
    assert "SM 8.9" in " ".join(decision.reason for decision in chosen.decisions)


def test_turing_computes_in_float32_never_in_float16(gpu: Callable[..., None]) -> None:
    gpu((7, 5), flash_attn=True)
    chosen = place(QuantSpec())
    assert chosen.compute_dtype == torch.float32
    assert chosen.attention == "sdpa", "flash attention takes 16-bit inputs only"
    assert any("SM 7.5" in decision.reason for decision in chosen.decisions)


@pytest.mark.parametrize(
    ("spec", "flash_attn", "expected"),
    [
        ({}, True, "flash_attention_2"),
        ({}, False, "sdpa"),
        ({"bits": 32}, True, "sdpa"),
        ({"attention": "eager"}, True, "eager"),
    ],
)
def test_attention(gpu: Callable[..., None], spec: dict[str, Any], flash_attn: bool, expected: str) -> None:
    gpu((8, 9), flash_attn)
    assert place(QuantSpec(**spec)).attention == expected


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 9)])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_every_decision_has_a_reason(gpu: Callable[..., None], capability: tuple[int, int] | None, bits: int) -> None:
    gpu(capability)
    decisions = place(QuantSpec.model_validate({"bits": bits})).decisions
    assert [decision.what for decision in decisions] == [
        "device",
        "weights",
        "compute dtype",
        "embeddings, norms, head",
        "attention",
    ]
    assert all(decision.choice and len(decision.reason) > 5 for decision in decisions)


def test_what_is_asked_for_wins_and_is_said(gpu: Callable[..., None]) -> None:
    gpu((8, 9))
    chosen = place(QuantSpec(device="cpu", compute_dtype="bfloat16", dtype="float32"))
    assert (chosen.device.type, chosen.compute_dtype, chosen.dtype) == ("cpu", torch.bfloat16, torch.float32)
    assert [d.reason for d in chosen.decisions if d.what in ("device", "compute dtype")] == ["asked for", "asked for"]


def test_cuda_asked_for_where_there_is_none(gpu: Callable[..., None]) -> None:
    gpu(None)
    with pytest.raises(BackboneError, match="no CUDA device"):
        place(QuantSpec(device="cuda"))


@pytest.mark.parametrize("setting", [{"compute_dtype": "bfloat16"}, {"dtype": "bfloat16"}])
def test_32_bits_cannot_be_less(gpu: Callable[..., None], setting: dict[str, Any]) -> None:
    """The label of a run says 32-bit: neither products nor weights may then be in 16 bits."""
    gpu((8, 9))
    with pytest.raises(BackboneError, match="32"):
        place(QuantSpec(bits=32, **setting))


def test_the_optimizer_follows_device_and_weights() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    chosen = [optimizer(cpu, True), optimizer(cpu, False), optimizer(cuda, True), optimizer(cuda, False)]
    assert [decision.choice for decision in chosen] == [
        "adamw_torch",
        "adamw_torch",
        "paged_adamw_8bit",
        "adamw_torch_fused",
    ]
    assert all(len(decision.reason) > 5 for decision in chosen)
