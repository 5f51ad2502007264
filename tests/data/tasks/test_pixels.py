"""The numbers a base reads equal those of transformers' own image processors, and nothing unknown is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftkit.data.tasks.pixels import DEFAULTS, Pixels, pixels_of, positions
from peftkit.errors import BaseError, DataError
from peftkit.events import Decision

Image = pytest.importorskip("PIL.Image")

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"height": 48, "width": 40}
STATED: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "vit of an old file": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, **IMAGENET},
    "fast": {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 32}, "do_pad": False},
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, **IMAGENET},
    "resnet of an old file": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 32, "crop_pct": 0.875},
    "convnext that warps": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 390}},
    "efficientnet": {"image_processor_type": "EfficientNetImageProcessor", "size": SQUARE},
    "efficientnet, offset": {
        "image_processor_type": "EfficientNetImageProcessor", "size": SQUARE, "resample": 0, "include_top": False,
        "rescale_offset": True, "rescale_factor": 1 / 127.5,
    },
    "efficientnet, cropped": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"shortest_edge": 41}, "do_center_crop": True,
        "crop_size": {"height": 37, "width": 32}, "include_top": False, "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
    },
    "a crop larger than the image": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 21}, "crop_size": 30,
    },
    "an odd crop": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 33}, "crop_size": 20},
    "no resize": {"image_processor_type": "DeiTImageProcessor", "do_resize": False, "crop_size": 33},
    "no normalize": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_normalize": False},
    "no rescale": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_rescale": False},
}  # fmt: skip


def write(folder: Path, stated: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise over a gradient: wide, tall, square, odd, and smaller than any size above."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for width, height in ((64, 48), (47, 91), (50, 50), (33, 31), (9, 7)):
        gradient = np.linspace(0, 200, width)[None, :, None] + draw.integers(0, 56, (height, width, 3))
        paths.append(folder / f"{width}x{height}.png")
        Image.fromarray(gradient.astype(np.uint8)).save(paths[-1])
    return paths


def theirs(folder: Path, path: Path) -> np.ndarray:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", local_files_only=True)
    return np.asarray(processor(Image.open(path), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("name", STATED)
def test_pixels_are_those_of_transformers(name: str, pictures: list[Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "base", STATED[name])
    pixels = pixels_of(folder)
    for path in pictures:
        ours = pixels(path)
        assert ours.dtype == np.float32
        assert ours.shape == (3, *pixels.size)
        np.testing.assert_allclose(ours, theirs(folder, path), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_silent_file_means_the_defaults_of_its_processor(kind: str, pictures: list[Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "base", {"image_processor_type": kind})
    np.testing.assert_allclose(pixels_of(folder)(pictures[0]), theirs(folder, pictures[0]), rtol=0, atol=1e-6)


def test_what_transformers_saves_is_read_back(pictures: list[Path], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = write(tmp_path / "base", STATED["efficientnet, cropped"])
    again = tmp_path / "again"
    AutoImageProcessor.from_pretrained(str(folder), backend="pil", local_files_only=True).save_pretrained(str(again))
    assert pixels_of(again) == pixels_of(folder)
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": STATED["efficientnet, cropped"]}))
    assert pixels_of(nested) == pixels_of(folder)


def test_real_photographs_too(test_data: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "base", STATED["resnet"] | {"size": {"shortest_edge": 224}})
    paths = sorted((test_data / "sign_digits_subset" / "test").glob("*/*.JPG"))[::12]
    pixels = pixels_of(folder)
    for path in paths:
        np.testing.assert_allclose(pixels(path), theirs(folder, path), rtol=0, atol=1e-6)
    assert len(paths) == 5


def test_a_base_that_does_not_say_gets_a_stated_default(pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_size": 32}')
    told: list[Any] = []
    pixels = pixels_of(tmp_path, told.append)
    assert [type(event) for event in told] == [Decision]
    assert "no preprocessor_config.json" in told[0].reason
    resized = np.asarray(Image.open(pictures[1]).resize((32, 32), 2)).astype(np.float64) / 255
    wanted = (resized - IMAGENET["image_mean"]) / IMAGENET["image_std"]
    np.testing.assert_allclose(pixels(pictures[1]), wanted.transpose(2, 0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"image_processor_type": "ViTImageProcessor", "size_divisor": 32, "do_thumbnail": True}, "do_thumbnail, size"),
        ({"image_processor_type": "ViTImageProcessor", "crop_pct": 0.9}, "crop_pct"),
        ({"image_processor_type": "LevitImageProcessor"}, "'LevitImageProcessor'"),
        ({}, "''"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 32}}, "sizes of their own"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "sizes of their own"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 32}}, "longest_edge"),
        ({"image_processor_type": "ViTImageProcessor", "size": "large"}, "large"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}, "1 channels"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": ["x"] * 3}, "ValueError"),
        ({"image_processor_type": "ConvNextImageProcessor", "do_center_crop": True}, "no crop of its own"),
    ],
)
def test_what_is_not_known_is_refused_by_name(stated: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BaseError) as caught:
        pixels_of(write(tmp_path / "base", stated))
    assert said in caught.value.fact
    assert "preprocessor_config.json" in caught.value.fact


def test_an_image_size_that_the_base_cannot_take_is_refused(tmp_path: Path) -> None:
    vit = {"image_size": 224, "patch_size": 16, "num_attention_heads": 12}
    with pytest.raises(BaseError, match=r"\(32, 32\)"):
        pixels_of(write(tmp_path / "base", STATED["vit"], vit))
    assert pixels_of(write(tmp_path / "base", STATED["vit"], vit | {"image_size": [32, 32]})).size == (32, 32)
    assert pixels_of(write(tmp_path / "base", STATED["vit"], {"image_size": 600})).size == (32, 32)  # a conv net


def test_pixels_of_a_file_that_went_away_are_an_error_that_names_it(tmp_path: Path) -> None:
    pixels = Pixels((8, 8), 2, None, 1 / 255, False, None, (1.0,) * 3)
    with pytest.raises(DataError, match=r"gone\.png: is not there"):
        pixels(tmp_path / "gone.png")
    assert pixels.record()["resize"] == (8, 8)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"image_size": 224, "patch_size": 16, "num_attention_heads": 12}, 197),
        ({"image_size": [224, 192], "patch_size": [16, 32], "num_attention_heads": 12}, 14 * 6 + 1),
        ({"image_size": 224}, 49),
        ({}, 49),
        ({"image_size": 600, "model_type": "efficientnet"}, 19 * 19),
        ({"image_size": 224, "patch_size": 4, "model_type": "convnext"}, 49),
    ],
)
def test_positions(config: dict[str, Any], count: int) -> None:
    assert positions(config) == count


def test_positions_are_those_of_the_models() -> None:
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel, ViTConfig, ViTModel

    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=48)
    seen = ViTModel(vit, add_pooling_layer=False)(torch.zeros(1, 3, 48, 48)).last_hidden_state
    assert seen.shape[1] == positions(vit.to_dict())
    net = EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, image_size=96)
    map_ = EfficientNetModel(net).eval()(torch.zeros(1, 3, 96, 96)).last_hidden_state
    assert map_.shape[2] * map_.shape[3] == positions(net.to_dict())
