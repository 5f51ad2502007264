"""Injected layers: the base until trained, exact gradients through a quantized base, files that load anywhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.backbone.bnb import Linear4bit, functional
from peftkit.backbone.contain import base_tensors, is_repacked
from peftkit.backbone.quantize import dense_weight
from peftkit.errors import TuningError
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.tuned import Tuned

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])
METHOD_NAMES = ["dora", "lora", "rslora"]  # the others: test_trained_methods.py


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(tuned: Tuned) -> dict[str, torch.Tensor]:
    """Gradients of one training step's loss; the adapter is left without any."""
    tuned.model.train()
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad for name, parameter in tuned.trainable.items()}
    tuned.model.zero_grad(set_to_none=True)
    return found


def disturb(tuned: Tuned, seed: int = 0, size: float = 0.1) -> Tuned:
    """Move every adapter tensor off its initial value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return tuned


def densify(model: nn.Module) -> int:
    """Replace every 4-bit layer by an nn.Linear with the weights that it stands for."""
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                dense = nn.Linear(child.in_features, child.out_features, bias=False)
                dense.weight = nn.Parameter(dense_weight(child), requires_grad=False)
                setattr(module, name, dense)
                replaced += 1
    return replaced


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_gradients_through_nf4_are_those_through_the_dequantized_weights(
    load: Callable[..., Any], method: str, double_quant: bool
) -> None:
    spec = AdapterSpec(method=method, r=4)
    packed, dense = load(bits=4, double_quant=double_quant), load(bits=4, double_quant=double_quant)
    assert densify(dense.model) == 14
    first, second = (gradients(disturb(inject(backbone, spec))) for backbone in (packed, dense))
    assert len(first) == 14 * (3 if method == "dora" else 2)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert float(gradient.norm()) > 0, name
        assert float((gradient - second[name]).norm() / second[name].norm()) < 1e-5, name


@pytest.mark.full
@pytest.mark.base
def test_gradients_through_the_embedded_base(embedded: Path, cache: Path) -> None:
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec

    tuned = disturb(inject(load_backbone(BaseSpec(), QuantSpec(), cache), AdapterSpec(r=4)), size=0.01)
    packed = gradients(tuned)
    assert densify(tuned.model) == 210
    dense = gradients(tuned)
    worst = max(float((packed[name] - dense[name]).norm() / dense[name].norm()) for name in packed)
    assert len(packed) == 420
    assert worst < 1e-5


def evaluate(tuned: Tuned, folder: Path) -> None:
    logits(tuned.model)


def evaluate_base(tuned: Tuned, folder: Path) -> None:
    with tuned.as_base() as model:
        logits(model)


def generate(tuned: Tuned, folder: Path) -> None:
    tuned.model.eval()
    tuned.model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


def state_dict(tuned: Tuned, folder: Path) -> None:
    torch.save(tuned.model.state_dict(), io.BytesIO())


def save(tuned: Tuned, folder: Path) -> None:
    save_adapter(tuned, folder / "adapter")


ACTIONS = [evaluate, evaluate_base, generate, state_dict, save]


def state_and_gradients(tuned: Tuned) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in base_tensors(tuned.model).items()}
    return state | {f"gradient of {name}": gradient for name, gradient in gradients(tuned).items()}


def differences(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in before if name not in after or not torch.equal(before[name], after[name])] + [
        name for name in after if name not in before
    ]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_base_bytes_and_gradients_survive(
    load: Callable[..., Any], tmp_path: Path, bits: int, action: Callable[[Tuned, Path], None]
) -> None:
    tuned = disturb(inject(load(bits=bits), AdapterSpec(r=4)))
    gradients(tuned)  # int8 layers move their weights into a state at the first forward
    before = state_and_gradients(tuned)
    assert len(before) > 42
    action(tuned, tmp_path)
    assert differences(before, state_and_gradients(tuned)) == []
    assert not is_repacked(tuned.model)


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16: nothing re-packs here")
@pytest.mark.parametrize("action", [evaluate, generate])
def test_negative_control_repacking_changes_bytes_and_gradients(
    load: Callable[..., Any], tmp_path: Path, action: Callable[[Tuned, Path], None]
) -> None:
    tuned = disturb(inject(load(bits=4), AdapterSpec(r=4)))
    before = state_and_gradients(tuned)
    for module in tuned.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    action(tuned, tmp_path)
    changed = differences(before, state_and_gradients(tuned))
    assert is_repacked(tuned.model)
    assert any(name.startswith("gradient of") for name in changed)
    assert any("quant_state" in name for name in changed)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_injected_and_untrained_the_logits_are_the_bases(load: Callable[..., Any], method: str, bits: int) -> None:
    backbone = load(bits=bits)
    before = logits(backbone.model)
    tuned = inject(backbone, AdapterSpec(method=method, r=4))
    after = logits(tuned.model)
    if method == "dora":  # m · V / ‖V‖ with m = ‖V‖ rounds
        assert float((after - before).norm() / before.norm()) < 1e-6
    else:
        assert torch.equal(before, after)
    with tuned.as_base() as model:
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("bits", [4, 16])
def test_with_the_adapter_off_the_logits_are_the_bases(load: Callable[..., Any], bits: int) -> None:
    backbone = load(bits=bits)
    before = logits(backbone.model)
    tuned = disturb(inject(backbone, AdapterSpec(r=4)))
    with_adapter = logits(tuned.model)
    assert not torch.allclose(with_adapter, before)
    with tuned.as_base() as model:
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(tuned.model), with_adapter)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_first_backward_moves_b_only(load: Callable[..., Any], bits: int) -> None:
    found = gradients(inject(load(bits=bits), AdapterSpec(r=4)))
    a = [gradient for name, gradient in found.items() if "lora_A" in name]
    b = [gradient for name, gradient in found.items() if "lora_B" in name]
    assert len(a) == len(b) == 14
    assert not any(gradient.any() for gradient in a)
    assert all(gradient.any() for gradient in b)


@pytest.mark.parametrize(("method", "scaling"), [("lora", 8 / 4), ("rslora", 8 / 4**0.5)])
def test_the_update_is_scaled_b_a(load: Callable[..., Any], method: str, scaling: float) -> None:
    backbone = load(bits=16)
    spec = AdapterSpec(method=method, r=4, lora_alpha=8, target_modules=["q_proj"])
    tuned = disturb(inject(backbone, spec))
    layer = tuned.model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    dense = layer.base_layer.weight + scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_adapters_are_float32_and_the_base_keeps_its_dtypes(load: Callable[..., Any], method: str, dtype: str) -> None:
    backbone = load(bits=4, dtype=dtype)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in base_tensors(backbone.model).items()}
    tuned = inject(backbone, AdapterSpec(method=method, r=4))
    assert {parameter.dtype for parameter in tuned.trainable.values()} == {torch.float32}
    assert tuned.trainable_parameters == sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    after = list(base_tensors(tuned.model).values())
    assert len(after) == len(before)
    assert {t.dtype for t in after} == {kind for kind, _ in before.values()}


def test_parameters_are_counted_as_the_formula_says(load: Callable[..., Any]) -> None:
    # r (in + out) for q, k, v, o, gate, up, down of two layers; k and v are 32 wide
    expected = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert inject(load(bits=4), AdapterSpec(r=4)).trainable_parameters == expected


def test_the_seed_decides_the_initial_values_and_nothing_else(load: Callable[..., Any]) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (inject(load(bits=4), AdapterSpec(r=4, seed=seed)).trainable for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "injection drew from the global generator"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_second_injection_is_refused(load: Callable[..., Any]) -> None:
    backbone = load(bits=4)
    inject(backbone, AdapterSpec(r=4))
    with pytest.raises(TuningError, match="already carries an adapter"):
        inject(backbone, AdapterSpec(r=4))


def test_target_modules_that_match_nothing(load: Callable[..., Any]) -> None:
    backbone = load(bits=4)
    before = logits(backbone.model)
    with pytest.raises(TuningError, match=r"target_modules=\['c_attn'\]") as caught:
        inject(backbone, AdapterSpec(r=4, target_modules=["c_attn"]))
    assert "q_proj" in str(caught.value)
    assert torch.equal(logits(backbone.model), before)
    assert inject(backbone, AdapterSpec(r=4)).trainable, "after the mistake is mended it must work"


def test_the_table_of_methods_is_complete() -> None:
    assert sorted(METHODS) == sorted(AdapterSpec.model_fields["method"].annotation.__args__)
    for name, method in METHODS.items():
        assert method.learning_rate > 0
        assert method.source
        assert bool(method.why_not) == (method.bits != (4, 8, 16, 32)), name


# -- files


@pytest.fixture
def hub_backbone(tiny_base: Path, tmp_path: Path) -> Any:
    """The tiny base as if it came from the Hub: its folder is somewhere in the cache of this machine."""
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec, LocatedBase

    located = LocatedBase(source="acme/tiny", kind="hub", revision="a" * 40, folder=tiny_base)
    return load_backbone(BaseSpec(source="acme/tiny"), QuantSpec(), tmp_path / "cache", located=located)


def test_an_adapter_is_two_files_without_a_path_of_this_machine(
    hub_backbone: Any, tiny_base: Path, tmp_path: Path
) -> None:
    folder = save_adapter(inject(hub_backbone, AdapterSpec(r=4)), tmp_path / "adapter")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    for place in (str(tiny_base), str(tmp_path), str(Path.home()) + os.sep, tiny_base.parent.name):
        assert not any(place.encode() in content for content in files.values()), place
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", "a" * 40)


def test_saving_is_deterministic(hub_backbone: Any, tmp_path: Path) -> None:
    tuned = inject(hub_backbone, AdapterSpec(r=4))
    first, second = (save_adapter(tuned, tmp_path / name) for name in ("one", "two"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_no_embeddings_are_saved(load: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = save_adapter(inject(load(bits=4), AdapterSpec(r=4)), tmp_path / "adapter")
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        names = list(file.keys())
    assert len(names) == 28
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


NEW_PROCESS = """
import sys, torch
from pathlib import Path
from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
folder, base, bits, out, cache = sys.argv[1:]
backbone = load_backbone(BaseSpec(source=base), QuantSpec(bits=int(bits)), Path(cache))
from peft import PeftModel
model = PeftModel.from_pretrained(backbone.model, folder).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor(%s)).logits, out)
"""


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_plain_peft_loads_it_with_bitwise_equal_logits(
    load: Callable[..., Any], tmp_path: Path, method: str, bits: int
) -> None:
    from peft import PeftModel

    tuned = disturb(inject(load(bits=bits), AdapterSpec(method=method, r=4)))
    folder = save_adapter(tuned, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(bits=bits).model, str(folder))
    assert torch.equal(logits(loaded), logits(tuned.model))


def test_a_new_process_computes_bitwise_the_same(load: Callable[..., Any], tiny_base: Path, tmp_path: Path) -> None:
    tuned = disturb(inject(load(bits=4), AdapterSpec(r=4)))
    folder, out = save_adapter(tuned, tmp_path / "adapter"), tmp_path / "logits.pt"
    code = NEW_PROCESS % IDS.tolist()
    arguments = [str(folder), str(tiny_base), "4", str(out), str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(out), logits(tuned.model))
