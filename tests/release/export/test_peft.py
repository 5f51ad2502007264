"""The canonical PEFT folder: PEFT itself reads the registered adapter's logits from it, and it imports again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from release.export.conftest import LORA

from peftkit.errors import DeltaError

Export = Callable[..., Any]
TOKENS = [[1, 40, 41, 42, 90, 200], [1, 7, 8, 258, 100, 60]]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits


def through_peft(bare: Callable[[], Any], folder: Path) -> Any:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(bare(), str(folder)).eval())


@pytest.mark.parametrize("variant", LORA)
def test_peft_reads_the_registered_logits_from_the_canonical_folder(
    variant: str, export: Export, bare: Callable[[], Any], saved: dict[str, Path]
) -> None:
    import torch
    from safetensors.torch import load_file

    receipt = export("peft", variant)
    config = json.loads((receipt.folder / "adapter_config.json").read_text())
    assert not config.get("use_rslora")
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert config["lora_alpha"] == config["r"]
    tensors = load_file(receipt.folder / "adapter_model.safetensors")
    ranks = {each.shape[0] for name, each in tensors.items() if "lora_A" in name or "embedding_A" in name}
    assert ranks == {config["r"]}
    registered = through_peft(bare, saved[variant])
    assert (through_peft(bare, receipt.folder) - registered).abs().max() <= 1e-5
    assert not torch.allclose(registered, logits(bare()), atol=0.05)  # the adapter does something


def test_the_receipt_states_digests_what_was_folded_and_the_error_of_the_files(export: Export, registry: Any) -> None:
    receipt = export("peft", "all")
    (each,) = receipt.versions.values()
    assert each == json.loads((receipt.folder / "peftkit_export.json").read_text())
    version = registry.resolve("all")
    assert each["version"] == version.reference
    assert each["input"] == {path: file.sha256 for path, file in version.manifest.files.items()}
    for name, digest in each["output"].items():
        assert hashlib.sha256((receipt.folder / name).read_bytes()).hexdigest() == digest
    assert set(receipt.files) == {*each["output"], "peftkit_export.json"}
    assert set(each["folded"]) == {"rslora", "rank_pattern", "alpha_pattern", "mixed_ranks"}
    assert len(each["error"]["tensors"]) == 14  # 7 linear layers in each of 2 blocks
    # One rounding of B' = s·B to float32 is at most 2⁻²⁴ of it, and of A nothing.
    assert 0 <= each["error"]["max"] <= 2**-23
    assert str(receipt.folder.parent) not in json.dumps(each)


def test_a_smaller_dtype_is_measured_on_the_files(export: Export) -> None:
    exact, rounded = (export("peft", name, dtype=dtype) for name, dtype in (("plain", None), ("alphas", "bfloat16")))
    (lost,) = (each["error"]["max"] for each in rounded.versions.values())
    # bfloat16 keeps 8 bits: each factor is off by at most 2⁻⁸, the product by about twice that.
    assert 2**-12 < lost < 2**-6
    assert next(iter(exact.versions.values()))["error"]["max"] <= 2**-23
    with pytest.raises(DeltaError, match="dtype 'int8'"):
        export("peft", "plain", dtype="int8", out=exact.folder.parent / "other")


def test_the_same_export_has_the_same_bytes(export: Export, tmp_path: Path) -> None:
    one, other = (export("peft", "ranks", out=tmp_path / name) for name in ("one", "other"))
    assert one.files == other.files
    for path in one.files:
        assert (one.folder / path).read_bytes() == (other.folder / path).read_bytes()


@pytest.mark.parametrize("variant", ["all", "both"])
def test_the_canonical_folder_imports_again(
    variant: str, export: Export, registry: Any, biased_base: Path, cache_folder: Path, tmp_path: Path
) -> None:
    from peftkit.base.identity import identify
    from peftkit.registry import Registry
    from peftkit.registry.exchange import ImportBase, import_adapter

    folder = export("peft", variant).folder
    base = ImportBase(identify(biased_base, cache_folder).record, biased_base.name, None, None)
    again = import_adapter(Registry(tmp_path / "again"), folder, name=variant, base=base)
    written = (folder / "adapter_model.safetensors").read_bytes()
    assert again.manifest.files["adapter_model.safetensors"].sha256 == hashlib.sha256(written).hexdigest()


def test_a_cut_rank_has_the_error_of_the_singular_values_left_out(export: Export, saved: dict[str, Path]) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    with pytest.raises(DeltaError, match=r"at rank 2, \d+\.\d% of ‖ΔW‖"):
        export("peft", "plain", rank=2)
    (each,) = export("peft", "plain", rank=2, force=True).versions.values()
    tensors = load_file(saved["plain"] / "adapter_model.safetensors")
    lost = whole = 0.0
    for name, right in tensors.items():
        if "lora_A" not in name:
            continue
        left = tensors[name.replace("lora_A", "lora_B")]
        values = np.linalg.svd(2.0 * left.astype(np.float64) @ right.astype(np.float64), compute_uv=False)
        lost, whole = lost + float((values[2:] ** 2).sum()), whole + float((values**2).sum())
        tensor = name.removeprefix("base_model.model.").replace(".lora_A", "")
        expected = float(np.sqrt((values[2:] ** 2).sum() / (values**2).sum()))
        assert each["error"]["tensors"][tensor] == pytest.approx(expected, rel=1e-5)
    assert each["cut"]["error"] == pytest.approx(np.sqrt(lost / whole), rel=1e-9)
    assert each["rank"] == 2
