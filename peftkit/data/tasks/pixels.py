"""From an image file to the numbers that a base reads, as its preprocessor_config.json says.

The steps and their order are those of transformers' image processors on Pillow (`image_processing_backends.PilBackend`
and the classes of `DEFAULTS`), in numpy: resize, crop, rescale, normalize.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peftkit.base.raw import json_file
from peftkit.data.tasks.picture import rgb
from peftkit.errors import BaseError
from peftkit.events import Decision, Report, silent

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""Height and width in pixels."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = (0.5, 0.5, 0.5)
_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_BILINEAR, _BICUBIC = 2, 3
_ALWAYS = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_center_crop": False,
    "image_mean": _HALF, "image_std": _HALF, "resample": _BICUBIC, "crop_size": {"height": 224, "width": 224},
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 224, "width": 224}, "resample": _BILINEAR},
    "DeiTImageProcessor": {"size": {"height": 256, "width": 256}, "do_center_crop": True},
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}},
    "BitImageProcessor": {"size": {"shortest_edge": 224}, "do_center_crop": True, **_CLIP},
    "CLIPImageProcessor": {"size": {"shortest_edge": 224}, "do_center_crop": True, **_CLIP},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "EfficientNetImageProcessor": {
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "rescale_offset": False,
        "include_top": True,
    },
}
"""What each processor of transformers 5 does where the file is silent."""
_NO_EFFECT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format", "device",
    "input_data_format", "return_tensors", "disable_grouping", "default_to_square", "use_fast", "backend",
}  # fmt: skip
_WARPS_FROM = 384
"""ConvNext's processor crops below this size and warps from it on."""


@dataclass(frozen=True)
class Pixels:
    """What is done to an image before a base sees it; calling it with a path gives float32 of shape (3, H, W)."""

    resize: Size | int | None
    """To this height and width, or the shorter side to so many pixels."""
    resample: int
    """Pillow's number of the filter."""
    crop: Size | None
    """The middle; where the image is smaller, black around it."""
    scale: float | None
    minus_one: bool
    """1 is subtracted after scaling."""
    mean: tuple[float, ...] | None
    std: tuple[float, ...]
    twice: bool = False
    """Divided by `std` once more (EfficientNet's include_top)."""

    @property
    def size(self) -> Size:
        """Height and width of what it gives."""
        size = self.crop or self.resize
        if not isinstance(size, tuple):
            raise BaseError("these pixels have no one size", expected="a crop, or a height and a width")
        return size

    def __call__(self, path: Path) -> NDArray[np.float32]:
        """The numbers of one image file. Raises DataError when it cannot be decoded."""
        image = np.asarray(self._resized(rgb(path))).transpose(2, 0, 1)
        if self.crop:
            image = _center(image, self.crop)
        values = image.astype(np.float32)
        if self.scale is not None:
            values = (image.astype(np.float64) * self.scale).astype(np.float32) - np.float32(self.minus_one)
        if self.mean is not None:
            values = (values - _channels(self.mean)) / _channels(self.std)
        return values / _channels(self.std) if self.twice else values

    def _resized(self, image: Image) -> Image:
        if self.resize is None:
            return image
        height, width = self.resize if isinstance(self.resize, tuple) else _shorter_to(self.resize, image)
        return image.resize((width, height), resample=self.resample)

    def record(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return asdict(self)


def pixels_of(folder: Path, report: Report = silent) -> Pixels:
    """How the base in `folder` wants its images; a base that does not say gets ImageNet's mean and std, which is told.

    Raises BaseError for a processor or a setting that this reader does not know.
    """
    stated = _stated(folder)
    config = json_file(folder / "config.json")
    if stated is None:
        size = _image_size(config)
        why = f"{folder.name} has no preprocessor_config.json"
        report(Decision("pixels", f"{size[0]} x {size[1]}, bilinear, ImageNet's mean and std", why))
        return Pixels(size, _BILINEAR, None, 1 / 255, False, *_IMAGENET)
    pixels = _read(stated, folder / "preprocessor_config.json")
    if _patches(config) and "image_size" in config and pixels.size != _image_size(config):
        raise BaseError(
            f"{folder}: preprocessor_config.json makes images of {pixels.size}",
            expected=f"{_image_size(config)}, the image_size of config.json",
            hint="set size (and crop_size) in preprocessor_config.json to image_size of config.json",
        )
    return pixels


def positions(config: Mapping[str, Any]) -> int:
    """How many positions an image has in a base: patches and the class token, or a convolutional net's last map."""
    height, width = _image_size(config)
    patch = _patches(config)
    if patch:
        return (height // patch[0]) * (width // patch[1]) + 1
    return math.ceil(height / 32) * math.ceil(width / 32)


def _patches(config: Mapping[str, Any]) -> Size | None:
    """Patch size of a transformer; None of a convolutional net, also of ConvNext, whose stem has a patch size."""
    size = config.get("patch_size")
    return _pair(size) if isinstance(config.get("num_attention_heads"), int) and size else None


def _image_size(config: Mapping[str, Any]) -> Size:
    return _pair(config.get("image_size") or 224)


def _pair(size: Any) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _stated(folder: Path) -> dict[str, Any] | None:
    """The base's image processor as its files describe it; a processor_config.json that has one goes first."""
    nested = json_file(folder / "processor_config.json").get("image_processor")
    if isinstance(nested, dict):
        return nested
    path = folder / "preprocessor_config.json"
    return json_file(path) if path.exists() else None


def _read(stated: Mapping[str, Any], path: Path) -> Pixels:
    kind = _kind(stated, path)
    known = {**_ALWAYS, **DEFAULTS[kind]}
    unknown = sorted(key for key, value in stated.items() if value and key not in known and key not in _NO_EFFECT)
    if unknown:
        raise BaseError(f"{path} sets {', '.join(unknown)}, which {kind} does not have here", expected=", ".join(known))
    settings = known | {key: value for key, value in stated.items() if value is not None and key in known}
    try:
        return _pixels(kind, settings)
    except (KeyError, TypeError, ValueError) as error:
        raise BaseError(f"{path} cannot be used: {type(error).__name__} {error}", expected=f"a {kind}") from error


def _kind(stated: Mapping[str, Any], path: Path) -> str:
    name = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "")
    kind = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in DEFAULTS:
        raise BaseError(f"{path} names the image processor {name!r}", expected=f"one of {', '.join(DEFAULTS)}")
    return kind


def _pixels(kind: str, settings: Mapping[str, Any]) -> Pixels:
    """Settings → steps. Raises ValueError where images would end up in sizes of their own."""
    resize = _resize(settings["size"], kind) if settings["do_resize"] else None
    crop = _resize(settings["crop_size"], "crop") if settings["do_center_crop"] else None
    if kind == "ConvNextImageProcessor" and resize is not None:
        if not isinstance(resize, int) or crop:
            raise ValueError("this processor takes a shortest edge, and no crop of its own")
        if resize < _WARPS_FROM:
            crop, resize = (resize, resize), int(resize / settings["crop_pct"])
        else:
            resize = (resize, resize)
    if not isinstance(crop or resize, tuple) or isinstance(crop, int):
        raise ValueError("images would keep sizes of their own: set a crop, or a height and a width")
    mean, std = (_three(settings[name]) for name in ("image_mean", "image_std"))
    return Pixels(
        resize,
        int(settings["resample"]),
        crop,
        float(settings["rescale_factor"]) if settings["do_rescale"] else None,
        bool(settings.get("rescale_offset")) and settings["do_rescale"],
        mean if settings["do_normalize"] else None,
        std,
        bool(settings.get("include_top")),
    )


def _resize(size: Any, kind: str) -> Size | int:
    if isinstance(size, int):  # files of transformers 4.25 and older
        return size if "shortest_edge" in DEFAULTS.get(kind, {}).get("size", {}) else (size, size)
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            return int(size["shortest_edge"])
        if set(size) == {"height", "width"}:
            return int(size["height"]), int(size["width"])
    raise ValueError(f"size {size!r}")


def _three(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in (values if isinstance(values, (list, tuple)) else [values] * 3))
    if len(numbers) != 3:
        raise ValueError(f"{len(numbers)} channels instead of 3")
    return numbers


def _shorter_to(edge: int, image: Image) -> Size:
    width, height = image.size
    longer = int(edge * max(width, height) / min(width, height))
    return (longer, edge) if width <= height else (edge, longer)


def _center(image: NDArray[Any], size: Size) -> NDArray[Any]:
    """The middle of (3, h, w) in the size (3, H, W), with zeros where the image does not reach."""
    for axis, wanted in enumerate(size, start=1):
        have = image.shape[axis]
        first = (have - wanted) // 2
        if first < 0:
            pad = [(0, 0)] * 3
            pad[axis] = (-first, wanted - have + first)
            image = np.pad(image, pad)
        else:
            image = image.take(range(first, first + wanted), axis=axis)
    return image


def _channels(values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)[:, None, None]
