"""One image file: checked once, and decoded to the RGB picture that a person sees.

| in the file | becomes |
|---|---|
| an EXIF orientation | the picture turned upright |
| transparency | the picture on white |
| grey, palette, CMYK, YCbCr | RGB as Pillow converts it |
| grey in 16 bits | its upper 8 bits, where Pillow's own conversion would clip nearly all to white |
| an animation | its first frame |
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftkit.errors import DataError
from peftkit.extras import extra

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""By content; anything else under one of the endings stays closed (Pillow would start Ghostscript for an EPS)."""
MOST_ELONGATED = 100
"""Longer side over shorter side; a line of pixels would become millions of them when its short side is enlarged."""


@dataclass(frozen=True)
class Checked:
    """What the first look at an image file found."""

    problem: str | None
    """Why it cannot be used, in words that follow its name."""
    animated: bool = False


def check(path: Path) -> Checked:
    """Verify and decode an image file once; nothing is raised for a bad one."""
    _pillow()
    try:
        if path.stat().st_size == 0:
            return Checked("is empty (0 bytes)")
        with _opened(path) as image:
            width, height = image.size
            animated = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # of a phone: one picture, twice
            image.verify()
        if max(width, height) > MOST_ELONGATED * min(width, height):
            return Checked(f"is {width} x {height} pixels: one side is more than {MOST_ELONGATED} times the other")
        rgb(path)
    except DataError as error:
        return Checked(error.fact.removeprefix(f"{path}: "))
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        return Checked(_reason(error))
    return Checked(None, animated)


def rgb(path: Path) -> Image:
    """The upright picture in RGB. Raises DataError when the file cannot be decoded to its end."""
    _pillow()
    try:
        with _opened(path) as image:
            return _in_rgb(image)
    except Exception as error:  # as above
        raise DataError(f"{path}: {_reason(error)}", expected="a whole image", hint="mend or remove it") from error


def _pillow() -> Any:
    with extra("tasks", "reading images"):
        from PIL import Image
    return Image


def _opened(path: Path) -> Any:
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)  # Pillow's own limit, without its leeway
        return pillow.open(path, formats=_FORMATS)


def _in_rgb(image: Image) -> Image:
    """The rule for transparency is that of transformers' `convert_to_rgb`."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.int64) >> 8
        return Pillow.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in upright.getbands() or upright.info.get("transparency") is not None:
        upright = upright.convert("RGBA")
        white = Pillow.new("RGBA", upright.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, upright).convert("RGB")
    return upright.convert("RGB")


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb"
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image in {', '.join(_FORMATS)}"
    return f"cannot be decoded: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
