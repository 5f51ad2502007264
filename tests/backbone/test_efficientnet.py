"""EfficientNet-Lite0 in transformers' layout computes what the original net computes, to the last bits of a float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peftkit.backbone.efficientnet import GATE_OPEN, write_lite0
from peftkit.backbone.locate import license_of, locate
from peftkit.base import embedded as shipped
from peftkit.base import identity
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.errors import BaseError

pytestmark = pytest.mark.base
Weights = dict[str, torch.Tensor]

# (blocks, kernel, stride, expansion) of EfficientNet-B0, Table 1 of https://arxiv.org/abs/1905.11946; Lite keeps them
STAGES = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]


def same(x: torch.Tensor, weight: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """A convolution with TensorFlow's padding SAME, whose odd pixel goes to the right and below."""
    size, kernel = x.shape[-1], weight.shape[-1]
    pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    before, after = pad // 2, pad - pad // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)


def lite0(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """The net as `efficientnet_lite_pytorch/model.py` (0.1.0) has it, without squeeze-and-excitation."""
    w = {name: tensor.to(x.dtype) for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (
            w[f"{name}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-3) * scale + shift

    x = F.relu6(norm(same(x, w["_conv_stem.weight"], 2), "_bn0"))
    block = 0
    for repeats, _, stride, expansion in STAGES:
        for repeat in range(repeats):
            at, y = f"_blocks.{block}.", x
            if expansion > 1:
                y = F.relu6(norm(same(y, w[at + "_expand_conv.weight"]), at + "_bn0"))
            depthwise = w[at + "_depthwise_conv.weight"]
            y = F.relu6(norm(same(y, depthwise, 1 if repeat else stride, y.shape[1]), at + "_bn1"))
            y = norm(same(y, w[at + "_project_conv.weight"]), at + "_bn2")
            x = x + y if repeat else y
            block += 1
    x = F.relu6(norm(same(x, w["_conv_head.weight"]), "_bn1")).mean((2, 3))
    return x @ w["_fc.weight"].T + w["_fc.bias"]


@pytest.fixture(scope="module")
def base(cache: Path) -> LocatedBase:
    if not shipped.place_of("efficientnet-lite0", cache).exists():
        pytest.skip("embedded:efficientnet-lite0 is not in the cache: peftkit base fetch embedded:efficientnet-lite0")
    return locate(BaseSpec(source="embedded:efficientnet-lite0"), cache)


@pytest.fixture(scope="module")
def pickled(base: LocatedBase, cache: Path) -> Path:
    return shipped.place_of("efficientnet-lite0", cache)


@pytest.fixture(scope="module")
def original(pickled: Path) -> Weights:
    weights: Weights = torch.load(pickled, weights_only=True)
    return weights


@pytest.fixture(scope="module")
def fresh(pickled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted now: what lies in the cache may come from an older converter."""
    folder = tmp_path_factory.mktemp("lite0")
    write_lite0(pickled, folder)
    return folder


@pytest.fixture(scope="module")
def net(fresh: Path) -> Any:
    from transformers import AutoModelForImageClassification

    model, told = AutoModelForImageClassification.from_pretrained(
        str(fresh), output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    assert not any(told.values())
    return model.eval()


@pytest.fixture(scope="module")
def photographs(fresh: Path, test_data: Path) -> torch.Tensor:
    """Four hands, each with another digit: float32 (4, 3, 224, 224)."""
    pytest.importorskip("PIL")
    from peftkit.data.tasks.pixels import pixels_of

    pixels = pixels_of(fresh)
    assert pixels.size == (224, 224)
    paths = [sorted(folder.glob("*.JPG"))[0] for folder in sorted((test_data / "sign_digits_subset/test").iterdir())][
        ::3
    ]
    assert len(paths) == 4
    return torch.stack([torch.from_numpy(pixels(path)) for path in paths])


def test_logits_on_photographs_are_those_of_the_original(
    net: Any, original: Weights, photographs: torch.Tensor
) -> None:
    with torch.no_grad():
        single, double = net(photographs).logits, lite0(original, photographs.double())
        assert torch.allclose(single.double(), double, rtol=0, atol=1e-4)  # 50 layers of rounding at 2^-24
        exact = net.double()(photographs.double()).logits
        net.float()
    assert double.std() > 0.5
    assert torch.allclose(exact, double, rtol=0, atol=1e-12)
    assert (exact - double).abs().max() < 1e-12


def test_the_oracle_sees_a_wrong_padding(net: Any, original: Weights, photographs: torch.Tensor) -> None:
    shifted = photographs[:1].roll(1, dims=3)
    with torch.no_grad():
        assert (net(shifted).logits - lite0(original, photographs[:1])).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gate_is_exactly_open_and_never_learns(net: Any, dtype: torch.dtype) -> None:
    gate = torch.full((1,), GATE_OPEN, dtype=dtype, requires_grad=True)
    torch.sigmoid(gate).backward()
    assert torch.sigmoid(gate).item() == 1.0
    assert gate.grad is not None
    assert gate.grad.item() == 0.0
    layers = [module for name, module in net.named_modules() if name.endswith("squeeze_excite")]
    assert len(layers) == sum(repeats for repeats, *_ in STAGES) == 16
    for layer in layers:
        x = torch.randn(2, layer.dim, 3, 3)
        assert torch.equal(layer(x), x)


def test_every_original_number_is_in_it_once(fresh: Path, original: Weights) -> None:
    from safetensors.torch import load_file

    ours = {name: t for name, t in load_file(fresh / "model.safetensors").items() if "squeeze_excite" not in name}

    def key(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tuple(tensor.shape), tensor.numpy().tobytes()

    assert sorted(map(key, ours.values())) == sorted(map(key, original.values()))
    assert len(ours) == 296
    assert sum(t.numel() for name, t in ours.items() if name.endswith(("weight", "bias"))) == 4_652_008


def test_it_knows_a_palace_and_a_daisy(fresh: Path, net: Any, tmp_path: Path) -> None:
    """scikit-learn's two photographs: the Summer Palace in Beijing, and a flower; ImageNet classes 698 and 985."""
    datasets = pytest.importorskip("sklearn.datasets")
    Image = pytest.importorskip("PIL.Image")
    from peftkit.data.tasks.pixels import pixels_of

    found = []
    for number, picture in enumerate(datasets.load_sample_images().images):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        with torch.no_grad():
            numbers = torch.from_numpy(pixels_of(fresh)(tmp_path / f"{number}.png"))
            found.append(int(net(numbers[None]).logits.argmax()))
    assert found == [698, 985]


def test_it_is_a_base_with_a_licence_and_no_pickle(base: LocatedBase, fresh: Path, cache: Path) -> None:
    for path in fresh.iterdir():
        assert path.read_bytes() == (base.folder / path.name).read_bytes(), "CONVERSION was not raised"
    assert license_of(base) == identity.license_of(base.folder) == "apache-2.0"
    known = identity.identify(base.folder, cache)
    assert known.weights == "e8c83e522048f0284d96eccf23e2352fa1e34b92c027c9bcb8cf4608850fdfdc"
    assert {path.suffix for path in base.folder.iterdir()} == {".json", ".safetensors", ".md"}
    assert json.loads((base.folder / "config.json").read_text())["image_size"] == 224


def test_other_tensors_are_refused(original: Weights, tmp_path: Path) -> None:
    short = {name: tensor for name, tensor in original.items() if name != "_blocks.3._bn1.bias"}
    more = original | {"_blocks.3._se_reduce.weight": torch.zeros(1)}
    for number, (weights, said) in enumerate([(short, r"_blocks\.3\._bn1\.bias"), (more, "has no place")]):
        torch.save(weights, tmp_path / f"{number}.pth")
        with pytest.raises(BaseError, match=said):
            write_lite0(tmp_path / f"{number}.pth", tmp_path)


class Runs:
    """What a hostile pickle holds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"_fc.weight": Runs()}, "hostile.pth")
    with pytest.raises(BaseError, match="is not EfficientNet-Lite0"):
        write_lite0(tmp_path / "hostile.pth", tmp_path)
    assert not (tmp_path / "ran").exists()
