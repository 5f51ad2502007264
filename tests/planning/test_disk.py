"""Bytes of a run's files, against files that were written and figures that were published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import save_file

from peftkit.planning.architecture import architecture
from peftkit.planning.disk import Disk, DiskPart, check_free, checkpoint_bytes, disk_plan
from peftkit.planning.setting import Setting
from peftkit.training.checkpoint import Checkpoints

SMALL = architecture(
    {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 640,
        "vocab_size": 1000,
        "tie_word_embeddings": True,
    }
)
LLAMA32_3B = architecture(
    {
        "model_type": "llama",
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
)


def part(parts: tuple[DiskPart, ...], name: str) -> DiskPart:
    return next(each for each in parts if each.name == name)


def plan(setting: Setting, **more: bool) -> tuple[DiskPart, ...]:
    return disk_plan(LLAMA32_3B, setting, save_total_limit=2, keeps_best=True, **{"base_present": False, **more})


def test_published_sizes_of_an_adapter_and_of_a_base() -> None:
    """PEFT's method comparison: LoRA r 32 on q and v of Llama-3.2-3B is a file of 36.7 MB, the model one of 6.4 GB."""
    parts = plan(Setting(bits=16, r=32, target_modules=("q_proj", "v_proj")), merged=True)
    assert part(parts, "adapter").bytes / 1e6 == pytest.approx(36.7, abs=0.1)
    assert part(parts, "base").bytes / 1e9 == pytest.approx(6.4, abs=0.05)
    assert part(parts, "merged weights").bytes == part(parts, "base").bytes


def adapter_tensors(r: int) -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.layers"
    return {
        f"{prefix}.{layer}.{linear.name}.lora_{half}.weight": torch.zeros(shape)
        for linear in SMALL.linears
        for layer in range(linear.count)
        for half, shape in (("A", (r, linear.into)), ("B", (linear.out, r)))
    }


def test_an_adapter_file_has_the_planned_size(tmp_path: Path) -> None:
    save_file(adapter_tensors(16), tmp_path / "adapter_model.safetensors")
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    planned = part(disk_plan(SMALL, Setting(r=16), base_present=True, save_total_limit=1, keeps_best=False), "adapter")
    assert planned.bytes == pytest.approx(written, rel=0.01)


def test_shared_matrices_are_stored_though_they_are_not_trained(tmp_path: Path) -> None:
    """VeRA: two vectors for every layer, and one pair of matrices that covers the widest (256 → 640 and back)."""
    r, prefix = 64, "base_model.model.model.layers"
    vectors = {
        f"{prefix}.{layer}.{linear.name}.vera_lambda_{name}": torch.zeros(width)
        for linear in SMALL.linears
        for layer in range(linear.count)
        for name, width in (("b", linear.out), ("d", r))
    }
    shared = {"base_model.vera_A": torch.zeros(r, 640), "base_model.vera_B": torch.zeros(640, r)}
    save_file(vectors | shared, tmp_path / "adapter_model.safetensors")
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    setting = Setting(method="vera", r=r)
    planned = part(disk_plan(SMALL, setting, base_present=True, save_total_limit=1, keeps_best=False), "adapter")
    assert planned.bytes == pytest.approx(written, rel=0.03)  # 44 headers of about 150 bytes
    assert checkpoint_bytes(SMALL, setting) < planned.bytes  # which keeps what is trained


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_checkpoint_as_training_writes_it_has_the_planned_size(optim: str, tmp_path: Path) -> None:
    tensors = adapter_tensors(16)
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors.values()]
    optimizer = OPTIMIZERS[optim](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"adapter": tensors, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    folder = Checkpoints(tmp_path).write(1, state)
    written = sum(path.stat().st_size for path in folder.iterdir())
    planned = checkpoint_bytes(SMALL, Setting(r=16, optim=optim))  # type: ignore[arg-type]
    assert written <= planned <= 1.05 * written + 100_000


def test_8_bit_states_are_a_quarter() -> None:
    setting = Setting(r=64)
    adapter = part(plan(setting), "adapter").bytes
    assert checkpoint_bytes(LLAMA32_3B, setting) / adapter == pytest.approx(3, rel=0.01)  # 4 + 8 B over 4 B
    assert checkpoint_bytes(LLAMA32_3B, replace(setting, optim="adamw_8bit")) / adapter == pytest.approx(1.5, rel=0.02)


def test_one_checkpoint_more_than_is_kept_has_to_fit() -> None:
    setting = Setting()
    one = checkpoint_bytes(LLAMA32_3B, setting)
    assert part(plan(setting), "checkpoints").bytes == 4 * one
    alone = disk_plan(LLAMA32_3B, setting, base_present=True, save_total_limit=1, keeps_best=False)
    assert part(alone, "checkpoints").bytes == 2 * one
    assert [each.name for each in alone] == ["checkpoints", "adapter"]


def test_full_fine_tuning_keeps_all_of_the_base() -> None:
    setting = Setting(bits=16, method="full", in_place=True, dtype="bfloat16")
    assert checkpoint_bytes(LLAMA32_3B, setting) / LLAMA32_3B.parameters == pytest.approx(6, rel=0.001)
    assert part(plan(setting), "adapter").bytes / LLAMA32_3B.parameters == pytest.approx(2, rel=0.001)


def test_places_on_one_disk_share_its_room() -> None:
    parts = (
        DiskPart("checkpoints", "runs", 4_800_000_000, ""),
        DiskPart("adapter", "registry", 300_000_000, ""),
        DiskPart("base", "cache", 6_400_000_000, ""),
    )
    apart = {"runs": Disk(1, 5 * 10**9), "registry": Disk(2, 5 * 10**9), "cache": Disk(3, 6_400_000_000)}
    assert check_free(parts, apart) == []  # type: ignore[arg-type]
    shared = {"runs": Disk("/", 5 * 10**9), "registry": Disk("/", 5 * 10**9), "cache": Disk(3, 6_399_999_999)}
    first, second = check_free(parts, shared)  # type: ignore[arg-type]
    assert first.startswith("the disk has 5.0 GB free and the run needs 5.1 GB on it: ")
    assert first.endswith("checkpoints 4.8 GB in runs, adapter 300 MB in registry")
    assert "base 6.4 GB in cache" in second
    assert check_free(parts, {}) == []
